//! The exits of a function: the cold code at its end that saves a frame and leaves.
//!
//! Points at which the same slots are saved share an exit. A point passes its number in the scratch
//! local; the exit writes the frame, and all exits end in the code that returns with the status set.
//! Where each point saved its own frame, this cold code was half of the machine code and a third of
//! the time to compile it.
//!
//! ```text
//! block                    leave
//!   block                  exit 0
//!     block                exit 1
//!       block (results)    the function's body; a point branches to its exit
//!       end
//!       return with status 0
//!     end
//!     save the frame of exit 1, branch to leave
//!   end
//!   save the frame of exit 0
//! end
//! update the save pointer, return with status 1
//! ```
//!
//! A reference cannot be stored in memory, so a saved frame puts each of its references into the
//! next entry of the references table. Their number depends on the depth of the stack, and code
//! cannot compare references to store each only once; so the table grows during unwinding if it is
//! too short. (The host converts the entries to function indices for the frames.)

use super::{Version, Writer, store, zero};
use crate::instrument::error::InstrumentError;
use crate::instrument::meta::{self, SlotType, slot_type};
use crate::instrument::plan::Plan;
use wasm_encoder::{BlockType, HeapType, Instruction};
use wasmparser::ValType;

/// The code behind this block is common to all exits.
const LEAVE_LABEL: u32 = 1;

/// Label of the block that contains the function's body.
pub(super) fn body_label(plan: &Plan<'_>) -> u32 {
    match plan.exits.len() as u32 {
        0 => 1,
        exits => LEAVE_LABEL + 1 + exits,
    }
}

impl Writer<'_, '_> {
    /// Opens the blocks around the body.
    pub(super) fn open_exits(&mut self) {
        for _ in 1..self.body_label {
            self.i(&Instruction::Block(BlockType::Empty));
        }
    }

    /// Goes to the exit of a point, whose operands are in temporaries; `labels` are open.
    pub(super) fn exit(&mut self, point: usize, labels: u32) {
        let depth = self.pass_to_exit(point, labels);
        self.i(&Instruction::Br(depth));
    }

    /// With a condition on the stack: the same, if it is set, for a point without operands in its
    /// frame. (One block fewer to compile, and the compiler places the whole exit out of the way.)
    pub(super) fn exit_if(&mut self, point: usize) {
        let depth = self.pass_to_exit(point, self.labels);
        self.hint_unlikely();
        self.i(&Instruction::BrIf(depth));
    }

    /// Passes the point's number; returns the depth of its exit's label.
    fn pass_to_exit(&mut self, point: usize, labels: u32) -> u32 {
        let exit = self.plan.exit_of[point];
        self.used_exits[exit as usize] = true;
        let scratch = self.scratch;
        self.konst(self.plan.first_point + point as u32);
        self.i(&Instruction::LocalSet(scratch));
        labels - 1 - (LEAVE_LABEL + 1 + exit)
    }

    /// Behind the body: the exits, then their common end.
    pub(super) fn close_exits(&mut self) -> Result<(), InstrumentError> {
        for exit in (0..self.used_exits.len()).rev() {
            self.i(&Instruction::End);
            match self.used_exits[exit] {
                true => self.save(self.plan.exits[exit])?,
                // (A loop version omits points.)
                false => drop(self.i(&Instruction::Unreachable)),
            }
            self.i(&Instruction::Br(exit as u32));
        }
        self.i(&Instruction::End);
        self.leave();
        Ok(())
    }

    /// Writes a frame with the slots of this point to the save area. The scratch local has the
    /// number of the point that is left, and then the address behind the frame.
    fn save(&mut self, like: usize) -> Result<(), InstrumentError> {
        let saved = &self.plan.saved[like];
        let types = saved.iter().map(|slot| self.plan.slots[*slot as usize].1);
        let references = types.filter(|ty| matches!(ty, ValType::Ref(_))).count();
        self.make_room(references as u32);
        let pointer = self.control_arg(meta::SAVE_POINTER, 2);
        let (scratch, frame) = (self.scratch, self.frame);
        self.konst(0);
        self.i(&Instruction::I32Load(pointer));
        self.i(&Instruction::LocalTee(frame));
        self.i(&Instruction::LocalGet(scratch));
        let header = self.control_arg(0, 2);
        self.i(&Instruction::I32Store(header));
        let mut offset = meta::FRAME_HEADER_BYTES;
        for slot in saved {
            let (local, ty) = self.plan.slots[*slot as usize];
            self.save_slot(local, ty, offset)?;
            offset += slot_type(ty)?.bytes();
        }
        self.i(&Instruction::LocalGet(frame));
        self.konst(offset.next_multiple_of(8));
        self.i(&Instruction::I32Add);
        self.i(&Instruction::LocalSet(scratch));
        Ok(())
    }

    fn save_slot(&mut self, local: u32, ty: ValType, offset: u32) -> Result<(), InstrumentError> {
        let frame = self.frame;
        let arg = self.control_arg(offset, 0);
        if slot_type(ty)? == SlotType::FuncRef {
            let next = self.control_arg(meta::REF_POINTER, 2);
            self.konst(0).i(&Instruction::I32Load(next));
            self.get(local);
            self.i(&Instruction::TableSet(self.plan.refs));
            self.i(&Instruction::LocalGet(frame));
            self.konst(0).i(&Instruction::I32Load(next));
            self.i(&Instruction::I32Store(arg));
            self.konst(0);
            self.konst(0).i(&Instruction::I32Load(next));
            self.konst(1).i(&Instruction::I32Add);
            self.i(&Instruction::I32Store(next));
            return Ok(());
        }
        self.i(&Instruction::LocalGet(frame));
        self.get(local);
        self.i(&store(ty, arg));
        Ok(())
    }

    /// In front of a frame with this number of references: doubles the table if they do not fit. (A
    /// frame has fewer than the table's minimum size, so once is enough.)
    fn make_room(&mut self, references: u32) {
        if references == 0 {
            return;
        }
        let next = self.control_arg(meta::REF_POINTER, 2);
        let table = self.plan.refs;
        self.konst(0).i(&Instruction::I32Load(next));
        self.konst(references).i(&Instruction::I32Add);
        self.i(&Instruction::TableSize(table));
        self.i(&Instruction::I32GtU);
        self.i(&Instruction::If(BlockType::Empty));
        self.i(&Instruction::RefNull(HeapType::FUNC));
        self.i(&Instruction::TableSize(table));
        self.i(&Instruction::TableGrow(table));
        self.i(&Instruction::Drop);
        self.i(&Instruction::End);
    }

    /// The common end of all exits: sets the save pointer behind the frame, and returns with the
    /// status set.
    fn leave(&mut self) {
        self.check_save_area();
        let pointer = self.control_arg(meta::SAVE_POINTER, 2);
        let scratch = self.scratch;
        self.konst(0);
        self.i(&Instruction::LocalGet(scratch));
        self.i(&Instruction::I32Store(pointer));
        if self.version == Version::Hot {
            for ty in &self.plan.body.results {
                let zero = zero(*ty);
                self.i(&zero);
            }
        }
        self.konst(1);
    }

    /// During unwinding, after a frame whose end is in the scratch local: traps at the end of the
    /// save area. The runtime recognises by the frames already saved that this is no guest trap but
    /// an exhausted stack.
    fn check_save_area(&mut self) {
        let scratch = self.scratch;
        self.i(&Instruction::LocalGet(scratch));
        self.konst(meta::SAVE_END).i(&Instruction::I32GtU);
        self.i(&Instruction::If(BlockType::Empty));
        self.i(&Instruction::Unreachable);
        self.i(&Instruction::End);
    }
}
