//! Polls, and leaving at a point if a poll or a call's status demands it. The code that saves the
//! frame is left to `exit`.

use super::spill::BLOCK_VALUES_MAX;
use super::{Version, Writer, visible};
use crate::instrument::error::InstrumentError;
use crate::instrument::meta;
use wasm_encoder::{Instruction, MemArg, MemArgTarget};

impl Writer<'_, '_> {
    /// Polls whether this thread must leave at the next point.
    pub(super) fn poll(&mut self, memory: u32) {
        let request = MemArg {
            target: MemArgTarget::Memory(memory),
            ..self.control_arg(meta::REQUEST, 2)
        };
        self.konst(0);
        self.i(&Instruction::I32AtomicLoad(request));
    }

    /// Poll at a loop's header.
    pub(super) fn poll_loop(&mut self, construct: usize) -> Result<(), InstrumentError> {
        // It continues in that loop's own version. (A landing inside is past this.)
        let leaves = match self.version {
            Version::Hot => false,
            Version::Clone { first_loop } => first_loop.is_some(),
            Version::Loop { is_lean, .. } => {
                self.is_another(construct) && (is_lean || self.is_over)
            }
        };
        if leaves {
            self.konst(1);
            self.leave_if()?;
            let has_landings =
                self.lands() && !self.plan.body.constructs[construct].is_simple_loop();
            if !has_landings && let Some(frame) = self.open.last_mut() {
                frame.is_skipping = true;
                self.is_dead = !self.lands();
                self.i(&Instruction::Unreachable);
            }
            return Ok(());
        }
        self.poll(self.plan.control);
        if self.is_another(construct) && !self.has_loops() {
            return self.leave_if();
        }
        let mask = self.mask;
        self.i(&Instruction::LocalGet(mask));
        self.i(&Instruction::I32And);
        self.leave_if()?;
        self.i(&Instruction::I32Const(-1));
        self.i(&Instruction::LocalSet(mask));
        Ok(())
    }

    /// With a condition on the stack (of a poll, or a call's status): if it is set, saves the frame
    /// of the next point and leaves; else continues.
    pub(super) fn leave_if(&mut self) -> Result<(), InstrumentError> {
        let number = self.next_point;
        self.next_point += 1;
        let point = &self.plan.body.points[number];
        let (visible, operands) = visible(point);
        if operands == 0 {
            self.exit_if(number);
            return Ok(());
        }
        if visible.len() > BLOCK_VALUES_MAX {
            self.leave_if_spilled(number, &visible);
            return Ok(());
        }
        let ty = self.types.block(&visible, &visible)?;
        self.cold_if(ty);
        for _ in &point.results {
            self.i(&Instruction::Drop);
        }
        self.spill(&visible[..operands], point.outer);
        // The `if` itself adds a label.
        self.exit(number, self.labels + 1);
        self.i(&Instruction::End);
        Ok(())
    }
}
