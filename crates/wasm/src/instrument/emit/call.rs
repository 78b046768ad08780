//! Calls and references to functions, in the hot version and in clones, which reach them in another
//! way ([`crate::instrument::callees`]).

use super::{Version, Writer, missing};
use crate::instrument::callees::Callee;
use crate::instrument::error::InstrumentError;
use wasm_encoder::{BlockType, Instruction};

impl Writer<'_, '_> {
    pub(super) fn call(&mut self, callee: u32) -> Result<(), InstrumentError> {
        self.call_directly(callee);
        if self.plan.graph.may_unwind(callee) {
            self.leave_if()?;
            self.land_at_point();
        } else if self.plan.graph.has_status(callee) {
            self.i(&Instruction::Drop);
        }
        Ok(())
    }

    pub(super) fn tail_call(&mut self, callee: u32) -> Result<(), InstrumentError> {
        let graph = self.plan.graph;
        let (mine, theirs) = (
            graph.has_status(self.plan.function),
            graph.has_status(callee),
        );
        if self.version == Version::Hot && mine == theirs {
            self.i(&Instruction::ReturnCall(callee));
            return Ok(());
        }
        self.call_directly(callee);
        match (self.version, mine, theirs) {
            (Version::Clone { .. } | Version::Loop { .. }, _, true) => {
                self.after_clone_tail_call();
            }
            (Version::Hot, false, true) => {
                // The callee cannot unwind, else this function would carry a
                // status too.
                self.i(&Instruction::Drop);
                self.write_return();
            }
            _ => self.write_return(),
        }
        Ok(())
    }

    /// The call itself, without its status.
    fn call_directly(&mut self, callee: u32) {
        let function = match self.plan.callees.callee(callee) {
            _ if self.version == Version::Hot => callee,
            Callee::Exported => callee,
            Callee::Dispatched {
                dispatcher,
                position,
            } => {
                self.konst(position);
                dispatcher
            }
        };
        self.i(&Instruction::Call(function));
    }

    /// A clone is called by the runtime, so its tail callee cannot replace it on the native stack.
    /// The frames handle it: when the callee unwinds, nothing of the clone is saved.
    pub(super) fn after_clone_tail_call(&mut self) {
        self.cold_if(BlockType::Empty);
        self.konst(1).i(&Instruction::Return);
        self.i(&Instruction::End);
        self.write_return();
    }

    /// A reference to a function in a clone: that of the hot module, because references are compared
    /// by identity.
    pub(super) fn reference(&mut self, function: u32) -> Result<(), InstrumentError> {
        let entry = self.plan.callees.reference(function);
        self.konst(entry.ok_or_else(|| missing("a reference"))?);
        self.i(&Instruction::TableGet(self.plan.refs + 1));
        Ok(())
    }
}
