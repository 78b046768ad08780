//! Placement of the threads of a machine: the part of each, its CPU usage there, and its moves, to
//! another part or, for tests, to a fresh instance. The policy is elsewhere.

use super::super::cpu_usage::CpuUsage;
use super::super::image::Image;
use super::super::lock::locked;
use super::super::parts::{Members, Order, Report, SpawnPolicy};
use super::super::signal::Signal;
use super::{Machine, MachineError, Outcome, Phase, Thread, ThreadInfo};
use crate::coherence::{PartId, PartSet};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

impl Machine {
    /// Captures one running thread and resumes it in a fresh instance, for tests. False if there is
    /// no such thread, if the machine is not running, or if the thread ran for less time since the
    /// last recapture than that took.
    pub fn recapture(&self, tid: u32) -> bool {
        let mut threads = locked(&self.shared.threads);
        if threads.phase != Phase::Running {
            return false;
        }
        let Some(thread) = threads.table.get_mut(&tid).filter(|thread| thread.rested()) else {
            return false;
        };
        thread.rebuild = true;
        thread.signal.request();
        true
    }

    /// Sets the members of a machine, reached through `link`, and the placement of new threads. Its
    /// memories become the home's part of `crate::coherence`. Returns when the members' memories
    /// are as large.
    ///
    /// # Errors
    /// [`MachineError::NotFrozen`]; [`MachineError::ThreadsAtMember`] if threads run at members
    /// that would be removed.
    pub fn set_members(
        &self,
        members: Vec<PartId>,
        link: Option<Arc<dyn Members>>,
        spawning: SpawnPolicy,
    ) -> Result<(), MachineError> {
        let threads = locked(&self.shared.threads);
        if threads.phase != Phase::Frozen {
            return Err(MachineError::NotFrozen);
        }
        let here = |part: PartId| part == PartId::HOME || members.contains(&part);
        let stays =
            |thread: &&Thread| !here(thread.place) || !here(thread.seat.unwrap_or(thread.place));
        let away = threads.table.values().filter(stays);
        match away.count() {
            0 => self.shared.parts.set(members, link, spawning),
            count => return Err(MachineError::ThreadsAtMember(count)),
        }
        drop(threads);
        // (A machine whose members were lost meanwhile ends.)
        for (number, memory) in (0..).zip(self.shared.memories.iter()) {
            if !self.shared.parts.open(number, memory.size_bytes()) {
                return Err(MachineError::Members);
            }
        }
        Ok(())
    }

    /// Handles a report of a member.
    pub fn receive(&self, from: PartId, report: Report) {
        if let Report::Opened {
            memory,
            bytes,
            done,
        } = report
        {
            return self.shared.parts.grown(from, (memory, bytes), done);
        }
        if let Report::Times { at_ns, threads } = report {
            return self.shared.parts.record_cpu_times(from, at_ns, threads);
        }
        if let Report::Expecting { tid } = report {
            let threads = locked(&self.shared.threads);
            // (Unless it has already left.)
            if let Some(thread) = threads.table.get(&tid).filter(|thread| thread.rebuild) {
                thread.signal.request();
            }
            return;
        }
        let Some(tid) = report.tid() else { return };
        let heard = {
            let threads = locked(&self.shared.threads);
            let thread = threads.table.get(&tid);
            thread.map(|thread| (thread.inbox.clone(), thread.signal.clone()))
        };
        if let Some((inbox, signal)) = heard {
            inbox.put(from, report);
            signal.wake();
        }
    }

    /// Its members were lost before the machine depended on them: pending waits end.
    pub fn members_lost(&self) {
        self.shared.parts.part_lost();
    }

    /// Ends the machine because a part is lost: no further reports arrive.
    pub fn part_lost(&self) {
        self.shared.end(Outcome::Stopped);
        self.shared.parts.part_lost();
        let threads = locked(&self.shared.threads);
        for thread in threads.table.values() {
            thread.inbox.close();
            thread.signal.wake();
        }
    }

    /// Moves a thread to another part at its next safepoint; does not wait. The first move may have
    /// to compile; the machine runs meanwhile.
    ///
    /// # Errors
    /// [`MachineError::NoThread`], [`MachineError::NoPart`], [`MachineError::Ended`],
    /// [`MachineError::Program`].
    pub fn move_thread(&self, tid: u32, to: PartId) -> Result<(), MachineError> {
        let shared = &self.shared;
        shared.program.prepare_resume()?;
        let mut threads = locked(&shared.threads);
        if threads.phase == Phase::Ended {
            return Err(MachineError::Ended);
        }
        if to != PartId::HOME {
            if shared.parts.is_leaving(to) {
                return Err(MachineError::Leaving(to));
            }
            if !shared.parts.members().contains(&to) {
                return Err(MachineError::NoPart(to));
            }
        }
        let thread = threads.table.get_mut(&tid);
        let thread = thread.ok_or(MachineError::NoThread(tid))?;
        if thread.place == to && thread.seat.is_none_or(|seat| seat == to) {
            return Ok(());
        }
        thread.place = to;
        thread.rebuild = true;
        let leaves = thread
            .seat
            .is_some_and(|seat| seat != PartId::HOME && seat != to);
        thread.inbox.set_leaves(leaves);
        let link = match to {
            PartId::HOME => None,
            _ => shared.parts.link(),
        };
        match link {
            // It continues here until its OS thread at the target is ready.
            Some(link) => {
                drop(threads);
                link.order(to, &Order::Expect { tid });
            }
            None => thread.signal.request(),
        }
        Ok(())
    }

    /// The signal of a thread; for a remote one that of its proxy.
    pub fn signal(&self, tid: u32) -> Option<Arc<Signal>> {
        let threads = locked(&self.shared.threads);
        threads.table.get(&tid).map(|thread| thread.signal.clone())
    }

    /// State of each of its threads.
    pub fn thread_infos(&self) -> Vec<ThreadInfo> {
        let link = self.shared.parts.link();
        let threads = locked(&self.shared.threads);
        let waits = locked(&self.shared.waits);
        let here_ns = u64::try_from(self.shared.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let infos = threads.table.iter().map(|(tid, thread)| {
            let part = thread.seat.unwrap_or(thread.place);
            ThreadInfo {
                tid: *tid,
                part,
                moves_to: (part != thread.place).then_some(thread.place),
                waits: waits.has(*tid),
                cpu_usage: match part == PartId::HOME {
                    true => thread.clock.as_ref().and_then(|clock| {
                        let time = clock.cpu_time()?;
                        let stalled_us = link.as_ref().map(|link| link.stalled_us(clock.os_thread));
                        Some(CpuUsage {
                            at_ns: here_ns,
                            time,
                            stalled_us: stalled_us.unwrap_or_default(),
                        })
                    }),
                    false => self.shared.parts.cpu_usage(*tid, part),
                },
            }
        });
        infos.collect()
    }

    /// Requests CPU times from all members; [`Self::thread_infos`] shows them once they have
    /// answered.
    pub fn request_cpu_times(&self) {
        self.shared.parts.request_cpu_times();
    }

    /// Time for which members have not answered [`Self::request_cpu_times`]; a live member answers
    /// within milliseconds.
    pub fn unresponsive_members(&self) -> BTreeMap<PartId, Duration> {
        self.shared.parts.unresponsive()
    }

    /// Sets the free cores per part: new threads start where most are free ([`SpawnPolicy::Room`]).
    pub fn set_free_cores(&self, room: BTreeMap<PartId, f64>) {
        self.shared.parts.set_free_cores(room);
    }

    /// Sets the leaving members: they receive neither new nor moved threads; all others do.
    pub fn drain_members(&self, members: PartSet) {
        // (Moving a thread holds this lock.)
        let _threads = locked(&self.shared.threads);
        self.shared.parts.drain(members);
    }

    /// Its threads with their current parts: a moving thread counts at its source until it has
    /// left.
    pub fn thread_locations(&self) -> BTreeMap<u32, PartId> {
        let threads = locked(&self.shared.threads);
        let places = threads.table.iter();
        places
            .map(|(tid, thread)| (*tid, thread.seat.unwrap_or(thread.place)))
            .collect()
    }

    /// Freezes it and moves every thread into a fresh instance, except those that
    /// [`Self::recapture`] would skip; for tests.
    ///
    /// # Errors
    /// As [`Self::freeze`].
    pub fn recapture_all(&self, patience: Duration) -> Result<(), MachineError> {
        self.freeze(patience)?;
        let image = self.image()?.encode()?;
        Image::decode(&image, &self.shared.program)?;
        for thread in locked(&self.shared.threads).table.values_mut() {
            let is_parked = thread.parked.as_ref().is_some_and(Option::is_some);
            thread.rebuild = is_parked && thread.rested();
        }
        self.thaw()
    }
}
