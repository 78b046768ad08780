//! Points with more operands than a block may have.

use super::Writer;
use wasm_encoder::{BlockType, Instruction};
use wasmparser::ValType;

/// Maximum parameters and results of a block type (an implementation limit).
pub(super) const BLOCK_VALUES_MAX: usize = 1000;

impl Writer<'_, '_> {
    /// As [`Self::leave_if`], if the operands, a call's results last, are too many for the block in
    /// which they would be saved: they pass through their temporaries instead. (Free on the hot
    /// path: to the compiler they are the same values.)
    pub(super) fn leave_if_spilled(&mut self, number: usize, visible: &[ValType]) {
        let outer = self.plan.body.points[number].outer;
        let condition = self.scratch;
        self.i(&Instruction::LocalSet(condition));
        self.spill(visible, outer);
        self.i(&Instruction::LocalGet(condition));
        self.cold_if(BlockType::Empty);
        self.exit(number, self.labels + 1);
        self.i(&Instruction::End);
        self.reload(visible, outer);
    }
}
