//! The entry of a clone at one of its points: the branches to the point that the resume number names,
//! and the values that are restored on the way. Leaving at a point is left to `poll` and `exit`.

use super::{Writer, visible};
use crate::instrument::body::{Construct, Landing, PointKind};
use crate::instrument::error::InstrumentError;
use crate::instrument::meta::{self, SlotType, slot_type};
use wasm_encoder::{BlockType, Instruction, MemArg};
use wasmparser::ValType;

impl Writer<'_, '_> {
    /// At a clone's entry: points at loop headers are in functions of their own.
    pub(super) fn go_to_loops(&mut self, first_loop: u32) {
        for (function, point) in (first_loop..).zip(self.plan.loops()) {
            self.i(&Instruction::LocalGet(0));
            self.konst(point + 1);
            self.i(&Instruction::I32Eq);
            self.i(&Instruction::If(BlockType::Empty));
            self.i(&Instruction::LocalGet(0));
            self.i(&Instruction::ReturnCall(function));
            self.i(&Instruction::End);
        }
    }

    /// At a clone's entry: loads all locals except those that only loop headers saved.
    pub(super) fn load_at_entry(&mut self) -> Result<(), InstrumentError> {
        let plan = self.plan;
        let locals = plan.body.locals.len();
        let mut wanted: Vec<bool> = plan
            .slots
            .iter()
            .map(|(local, _)| *local as usize >= locals)
            .collect();
        for (point, saved) in plan.body.points.iter().zip(&plan.saved) {
            if point.kind != PointKind::Loop {
                saved.iter().for_each(|slot| wanted[*slot as usize] = true);
            }
        }
        for slot in (0..wanted.len()).filter(|slot| wanted[*slot]) {
            self.load_slot(slot)?;
        }
        Ok(())
    }

    /// Start of a sequence: in a clone, one block for each landing, and the
    /// branch to the one that the resume number names.
    pub(super) fn open_sequence(
        &mut self,
        params: &[ValType],
        base: usize,
    ) -> Result<(), InstrumentError> {
        let Some(frame) = self.open.last() else {
            return Ok(());
        };
        let all: &[Landing] = &self.plan.body.sequences[frame.sequence];
        // (There is no landing at the header of a loop, its first point, but in front of the loop
        // in a clone that contains its loops.)
        let has_loops = self.has_loops();
        let landings: Vec<&Landing> = all
            .iter()
            .skip(usize::from(frame.polls))
            .filter(|landing| has_loops || !landing.is_simple_loop)
            .collect();
        let (Some(first), Some(last)) = (landings.first(), landings.last()) else {
            return Ok(());
        };
        if !self.lands() {
            return Ok(());
        }
        let (low, high) = (first.points.start, last.points.end);
        self.spill(params, base);
        // A landing at a simple loop is enclosed by a second block: the path that does not come
        // from here.
        let mut depths = Vec::with_capacity(landings.len());
        let mut blocks = 0;
        for landing in &landings {
            depths.push(blocks);
            blocks += 1 + u32::from(landing.is_simple_loop);
        }
        for _ in 0..blocks {
            self.i(&Instruction::Block(BlockType::Empty));
        }
        self.labels += blocks;
        if landings.len() == 1 {
            self.i(&Instruction::LocalGet(0));
            self.i(&Instruction::BrIf(0));
        } else if landings.len() > 8 && ((high - low) as usize) <= 4 * landings.len() {
            // Resume number n is point n - 1; the block around is for zero.
            // (At headers of loops nobody lands.)
            let mut table = vec![0; (high - low) as usize];
            for (depth, landing) in depths.iter().zip(&landings) {
                for point in landing.points.clone() {
                    table[(point - low) as usize] = depth + 1;
                }
            }
            self.i(&Instruction::Block(BlockType::Empty));
            self.i(&Instruction::LocalGet(0));
            self.konst(low + 1);
            self.i(&Instruction::I32Sub);
            self.i(&Instruction::BrTable(table.into(), 0));
            self.i(&Instruction::End);
        } else {
            self.i(&Instruction::Block(BlockType::Empty));
            self.i(&Instruction::LocalGet(0));
            self.i(&Instruction::I32Eqz);
            self.i(&Instruction::BrIf(0));
            for (depth, landing) in depths.iter().zip(&landings) {
                self.i(&Instruction::LocalGet(0));
                self.konst(landing.points.end);
                self.i(&Instruction::I32LeU);
                self.i(&Instruction::BrIf(depth + 1));
            }
            self.i(&Instruction::Unreachable);
            self.i(&Instruction::End);
        }
        self.reload(params, base);
        Ok(())
    }

    /// The condition of an `if` in a clone: its own, or on the way to a point the arm of that
    /// point.
    pub(super) fn choose_arm(&mut self, construct: &Construct) {
        let condition = self.plan.temps[&(construct.base + construct.operands.len(), ValType::I32)];
        self.i(&Instruction::LocalGet(0));
        self.konst(construct.else_point);
        self.i(&Instruction::I32LeU);
        self.get(condition);
        self.i(&Instruction::LocalGet(0));
        self.i(&Instruction::Select);
    }

    /// A landing for the next point or construct of the sequence being
    /// written. `operands` are those of its frame.
    pub(super) fn land(&mut self, operands: &[ValType], base: usize) {
        if !self.lands() {
            return;
        }
        self.spill(operands, base);
        self.i(&Instruction::End);
        self.labels -= 1;
    }

    /// A landing in front of a loop whose only point is its header: a landing inside would be a
    /// second entry into every iteration, and locals loaded before would be live on all paths
    /// through the clone; both cost a tight loop a fifth of its speed.
    pub(super) fn land_at_simple_loop(
        &mut self,
        operands: &[ValType],
        base: usize,
    ) -> Result<(), InstrumentError> {
        self.spill(operands, base);
        let mask = self.mask;
        self.i(&Instruction::I32Const(-1));
        self.i(&Instruction::LocalSet(mask));
        self.i(&Instruction::Br(1));
        self.i(&Instruction::End);
        self.load_locals(self.next_point)?;
        self.konst(0).i(&Instruction::LocalTee(mask));
        self.i(&Instruction::LocalSet(0));
        self.i(&Instruction::End);
        self.labels -= 2;
        Ok(())
    }

    /// In front of another loop in a clone that contains its loops: a resume at its header
    /// continues as if it came from the front, but does not leave immediately.
    pub(super) fn arrive_at_loop(&mut self) -> Result<(), InstrumentError> {
        let mask = self.mask;
        let number = self.next_point;
        self.i(&Instruction::I32Const(-1));
        self.i(&Instruction::LocalSet(mask));
        self.i(&Instruction::LocalGet(0));
        self.konst(number as u32 + 1);
        self.i(&Instruction::I32Eq);
        self.cold_if(BlockType::Empty);
        self.load_locals(number)?;
        self.konst(0).i(&Instruction::LocalTee(mask));
        self.i(&Instruction::LocalSet(0));
        self.i(&Instruction::End);
        Ok(())
    }

    /// Behind [`Self::leave_if`], in a clone: where a resume at that point
    /// arrives.
    pub(super) fn land_at_point(&mut self) {
        if !self.lands() {
            return;
        }
        let point = &self.plan.body.points[self.next_point - 1];
        let (visible, _) = visible(point);
        self.land(&visible, point.outer);
        self.konst(0).i(&Instruction::LocalSet(0));
        self.reload(&visible, point.outer);
    }

    /// In front of a loop: loads the locals that its header saved.
    fn load_locals(&mut self, number: usize) -> Result<(), InstrumentError> {
        let plan = self.plan;
        for slot in plan.saved[number].iter().map(|slot| *slot as usize) {
            if (plan.slots[slot].0 as usize) < plan.body.locals.len() {
                self.load_slot(slot)?;
            }
        }
        Ok(())
    }

    pub(super) fn load_slot(&mut self, slot: usize) -> Result<(), InstrumentError> {
        let (local, ty) = self.plan.slots[slot];
        let arg = self.control_arg(meta::RESTORE + self.plan.slot_offsets[slot], 0);
        self.konst(0);
        if slot_type(ty)? == SlotType::FuncRef {
            self.i(&Instruction::I32Load(arg));
            self.i(&Instruction::TableGet(self.plan.refs));
        } else {
            self.i(&load(ty, arg));
        }
        self.set(local);
        Ok(())
    }
}

fn load(ty: ValType, arg: MemArg) -> Instruction<'static> {
    match ty {
        ValType::I64 => Instruction::I64Load(arg),
        ValType::F32 => Instruction::F32Load(arg),
        ValType::F64 => Instruction::F64Load(arg),
        ValType::V128 => Instruction::V128Load(arg),
        ValType::I32 | ValType::Ref(_) => Instruction::I32Load(arg),
    }
}
