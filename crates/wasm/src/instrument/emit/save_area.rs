//! Room for what is saved: in the save area, and for references in the references table.
//!
//! A reference cannot lie in memory, so a frame that is saved puts each of its own into the
//! next entry of the references table. How many there are is a matter of how deep the thread
//! stands, and code cannot compare references to put one there only once; so the table grows
//! on the way out, where it is too short. (The host makes indices of the entries, which is
//! all that frames have of them.)

use super::Writer;
use crate::instrument::meta;
use wasm_encoder::{BlockType, HeapType, Instruction};

impl Writer<'_, '_> {
    /// In front of a frame that has so many references: doubles the table where they do not
    /// fit in. (A frame has fewer than the table's least size, so once is enough.)
    pub(super) fn make_room(&mut self, references: u32) {
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

    /// On the way out, behind a frame whose end is in the scratch local: traps where the save
    /// area ends. The runtime knows by the saved frames before it that this is no trap of the
    /// guest's, but an exhausted stack.
    pub(super) fn check_save_area(&mut self) {
        let scratch = self.scratch;
        self.i(&Instruction::LocalGet(scratch));
        self.konst(meta::SAVE_END).i(&Instruction::I32GtU);
        self.i(&Instruction::If(BlockType::Empty));
        self.i(&Instruction::Unreachable);
        self.i(&Instruction::End);
    }
}
