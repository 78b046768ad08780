//! Space for saved frames: in the save area, and for references in the references table.
//!
//! A reference cannot be stored in memory, so a saved frame puts each of its references into the
//! next entry of the references table. Their number depends on the depth of the stack, and code
//! cannot compare references to store each only once; so the table grows during unwinding if it is
//! too short. (The host converts the entries to function indices for the frames.)

use super::Writer;
use crate::instrument::meta;
use wasm_encoder::{BlockType, HeapType, Instruction};

impl Writer<'_, '_> {
    /// In front of a frame with this number of references: doubles the table if they do not fit. (A
    /// frame has fewer than the table's minimum size, so once is enough.)
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

    /// During unwinding, after a frame whose end is in the scratch local: traps at the end of the
    /// save area. The runtime recognises by the frames already saved that this is no guest trap but
    /// an exhausted stack.
    pub(super) fn check_save_area(&mut self) {
        let scratch = self.scratch;
        self.i(&Instruction::LocalGet(scratch));
        self.konst(meta::SAVE_END).i(&Instruction::I32GtU);
        self.i(&Instruction::If(BlockType::Empty));
        self.i(&Instruction::Unreachable);
        self.i(&Instruction::End);
    }
}
