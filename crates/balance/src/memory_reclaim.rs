//! Memory that systems give back to their node when it runs out of it, and get again when it has
//! enough: sooner and cheaper than a move. A system can do without what it keeps for files that it
//! may read again.
//!
//! | free memory of the node | each system |
//! |---|---|
//! | less than the headroom | gives back a part of what is missing, in proportion to what it can spare |
//! | so much that all that was given back fits into it, and 5 % of the node beside the headroom | has all of it again |
//! | between | stays as it is |
//!
//! What a system does not use at all its node has already (free page reporting), but a balloon takes
//! that first: so it is asked for that and, beyond it, for what it is to spare. Each system keeps an
//! eighth of its memory available to its programs. One that has less than half of that gets memory
//! again, however little its node has; so does one that says nothing any more.

/// Free memory that a node has beside its headroom after all systems have theirs again, as a share of
/// its memory.
const CALM_SHARE: f64 = 0.05;
/// The part of its memory that a system keeps available: one of so many.
const KEPT_PARTS: u64 = 8;
/// Changes by less than one of so many parts of a system's memory are not worth while.
const STEP_PARTS: u64 = 64;

/// The memory of a node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeMemory {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    /// The share of its memory that is to stay free ([`crate::policy::Policy::memory_headroom`]).
    pub headroom: f64,
}

/// The memory of a system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemMemory {
    /// What it was started with, in bytes.
    pub memory_bytes: u64,
    /// How much of that is in use.
    pub told: Told,
    /// What it has given back, in bytes.
    pub given_back_bytes: u64,
    /// What it was last asked to have given back, in bytes.
    pub asked_bytes: u64,
}

/// What a system tells of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Now {
        /// What its programs could use without swap space, in bytes.
        available_bytes: u64,
        /// What is not used for anything, in bytes.
        free_bytes: u64,
    },
    /// Nothing yet since it gave something back, or got it again.
    NotYet,
    /// Nothing, for too long.
    Silent,
}

impl SystemMemory {
    fn kept_bytes(&self) -> u64 {
        self.memory_bytes / KEPT_PARTS
    }

    /// What it keeps for files and can do without, in bytes.
    fn spare_bytes(&self) -> u64 {
        match self.told {
            Told::Now {
                available_bytes,
                free_bytes,
            } => available_bytes.saturating_sub(free_bytes.saturating_add(self.kept_bytes())),
            Told::NotYet | Told::Silent => 0,
        }
    }

    /// What it is to have given back if it is to spare this part of what it can; `None` if that is
    /// not worth while.
    fn spared(&self, part: f64) -> Option<u64> {
        let Told::Now { free_bytes, .. } = self.told else {
            return None;
        };
        let spared = (self.spare_bytes() as f64 * part) as u64;
        let is_worth_while = spared >= (self.memory_bytes / STEP_PARTS).max(1);
        is_worth_while.then_some(self.given_back_bytes + free_bytes + spared)
    }

    /// What it is to have given back if it lacks memory itself.
    fn relieved(&self) -> Option<u64> {
        if self.given_back_bytes == 0 {
            return None;
        }
        match self.told {
            Told::Now {
                available_bytes, ..
            } if available_bytes < self.kept_bytes() / 2 => {
                let lacking = self.kept_bytes() - available_bytes;
                Some(self.given_back_bytes.saturating_sub(lacking))
            }
            Told::Silent => Some(self.given_back_bytes / 2),
            Told::Now { .. } | Told::NotYet => None,
        }
    }

    /// Keeps what it has given back: what it has not given yet it need not.
    fn stopped(&self) -> Option<u64> {
        (self.asked_bytes > self.given_back_bytes).then_some(self.given_back_bytes)
    }
}

/// How much each system is to have given back, in bytes; `None` where nothing is to change.
pub fn reclaim(node: NodeMemory, systems: &[SystemMemory]) -> Vec<Option<u64>> {
    let share_of_node = |share: f64| (node.capacity_bytes as f64 * share) as u64;
    let low = share_of_node(node.headroom);
    let high = share_of_node(node.headroom + CALM_SHARE);
    let sum = |bytes: fn(&SystemMemory) -> u64| systems.iter().map(bytes).sum::<u64>();
    let spare = sum(SystemMemory::spare_bytes);
    let is_short = node.free_bytes < low;
    let missing = high.saturating_sub(node.free_bytes);
    let part = (missing as f64 / spare.max(1) as f64).min(1.0);
    let is_calm = node.free_bytes >= high.saturating_add(sum(|it| it.given_back_bytes));
    let wanted = systems.iter().map(|system| {
        let wanted = match system.relieved() {
            Some(less) => Some(less),
            // It is about to give what it was asked for.
            None if is_short => match system.told {
                Told::NotYet => None,
                _ => system.spared(part).or_else(|| system.stopped()),
            },
            None if is_calm => Some(0),
            None => system.stopped(),
        };
        wanted.filter(|wanted| *wanted != system.asked_bytes)
    });
    wanted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn node(free_bytes: u64) -> NodeMemory {
        NodeMemory {
            capacity_bytes: 100 * GIB,
            free_bytes,
            headroom: 0.05,
        }
    }

    fn system(available_bytes: u64, free_bytes: u64, given_back_bytes: u64) -> SystemMemory {
        SystemMemory {
            memory_bytes: 16 * GIB,
            told: Told::Now {
                available_bytes,
                free_bytes,
            },
            given_back_bytes,
            asked_bytes: given_back_bytes,
        }
    }

    #[test]
    fn they_give_back_in_proportion_to_what_they_can_spare() {
        let systems = [
            system(11 * GIB, GIB, 0),
            system(6 * GIB, 0, GIB),
            system(2 * GIB, 0, 0),
            // Its node has that already.
            system(14 * GIB, 13 * GIB, 0),
        ];
        // 8 + 4 GiB can be spared, and 6 are missing of 10.
        let given = [Some(5 * GIB), Some(3 * GIB), None, None];
        assert_eq!(reclaim(node(4 * GIB), &systems), given);
        // More is missing than there is.
        let huge = NodeMemory {
            headroom: 0.9,
            ..node(4 * GIB)
        };
        let given = [Some(9 * GIB), Some(5 * GIB), None, None];
        assert_eq!(reclaim(huge, &systems), given);
        assert_eq!(reclaim(node(0), &[]), []);
        // A little is not worth while.
        assert_eq!(reclaim(node(0), &[system(9 * GIB / 4 - 1, 0, 0)]), [None]);
    }

    #[test]
    fn they_have_it_again_once_all_of_it_fits() {
        let systems = [system(2 * GIB, 0, 6 * GIB), system(2 * GIB, 0, 2 * GIB)];
        for free in [5 * GIB, 10 * GIB, 18 * GIB - 1] {
            assert_eq!(reclaim(node(free), &systems), [None, None], "{free}");
        }
        assert_eq!(reclaim(node(18 * GIB), &systems), [Some(0), Some(0)]);
        let silent = SystemMemory {
            told: Told::NotYet,
            ..systems[0]
        };
        assert_eq!(reclaim(node(50 * GIB), &[silent]), [Some(0)]);
    }

    #[test]
    fn one_that_lacks_memory_gets_it_whatever_its_node_has() {
        let lacks = system(GIB / 2, 0, 5 * GIB);
        let expected = Some(5 * GIB - 3 * GIB / 2);
        for free in [0, 7 * GIB, 50 * GIB] {
            assert_eq!(reclaim(node(free), &[lacks]), [expected], "{free}");
        }
        assert_eq!(reclaim(node(0), &[system(GIB / 2, 0, 0)]), [None]);
        let silent = SystemMemory {
            told: Told::Silent,
            ..lacks
        };
        for free in [0, 7 * GIB] {
            let half = Some(5 * GIB / 2);
            assert_eq!(reclaim(node(free), &[silent]), [half], "{free}");
        }
    }

    #[test]
    fn what_was_not_given_yet_need_not_be_given_any_more() {
        let gives = SystemMemory {
            told: Told::NotYet,
            asked_bytes: 8 * GIB,
            ..system(0, 0, 3 * GIB)
        };
        // It goes on while the node is short of memory.
        assert_eq!(reclaim(node(GIB), &[gives]), [None]);
        assert_eq!(reclaim(node(7 * GIB), &[gives]), [Some(3 * GIB)]);
        assert_eq!(reclaim(node(50 * GIB), &[gives]), [Some(0)]);
        // What is on its way to it stays so.
        let gets = SystemMemory {
            asked_bytes: 0,
            ..gives
        };
        assert_eq!(reclaim(node(7 * GIB), &[gets]), [None]);
    }

    /// Programs and files in a system, as the test of rest has them.
    struct Model {
        used: u64,
        cached: u64,
        given: u64,
        asked: u64,
    }

    impl Model {
        /// Files fill what is free, and what is asked for is given, a GiB each at a time.
        fn step(&mut self) {
            let free = 16 * GIB - self.used - self.cached - self.given;
            if self.asked > self.given {
                let now = GIB.min(self.asked - self.given);
                self.cached -= now.saturating_sub(free);
                self.given += now;
            } else {
                self.given = self.asked;
                let free = 16 * GIB - self.used - self.cached - self.given;
                self.cached += GIB.min(free);
            }
        }

        fn memory(&self) -> SystemMemory {
            let free = 16 * GIB - self.used - self.cached - self.given;
            SystemMemory {
                asked_bytes: self.asked,
                told: match self.asked == self.given {
                    true => Told::Now {
                        available_bytes: free + self.cached,
                        free_bytes: free,
                    },
                    false => Told::NotYet,
                },
                ..system(0, 0, self.given)
            }
        }
    }

    /// The node is short of memory, then has a little more than it needs, then enough for all.
    #[test]
    fn it_comes_to_rest() {
        let mut systems = [3, 9, 14].map(|used| Model {
            used: used * GIB,
            cached: 0,
            given: 0,
            asked: 0,
        });
        let mut changes = Vec::new();
        for (phase, others) in [(0, 60), (1, 52), (2, 10)] {
            changes.clear();
            for round in 0..60 {
                let resident: u64 = systems.iter().map(|it| it.used + it.cached).sum();
                let free = (100 * GIB).saturating_sub(others * GIB + resident);
                let memory: Vec<_> = systems.iter().map(Model::memory).collect();
                let wanted = reclaim(node(free), &memory);
                for (system, wanted) in systems.iter_mut().zip(wanted) {
                    if let Some(wanted) = wanted {
                        let available = 16 * GIB - system.used - wanted;
                        assert!(wanted <= system.given || available >= 2 * GIB);
                        system.asked = wanted;
                        changes.push(round);
                    }
                    system.step();
                }
            }
            let last = changes.last().copied().unwrap_or_default();
            assert!(last < 40, "phase {phase}: {changes:?}");
            let given: u64 = systems.iter().map(|it| it.given).sum();
            assert_eq!(given == 0, phase == 2, "phase {phase}: {given}");
        }
    }
}
