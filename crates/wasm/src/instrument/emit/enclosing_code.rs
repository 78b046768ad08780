//! The code around the loop of a loop version: what is before the loop, and in other arms, is omitted;
//! enclosing loops are left at their headers. The loop itself is written as in other versions.

use super::{Open, Shape, Version, Writer, visible, zero};
use crate::instrument::error::InstrumentError;
use wasm_encoder::reencode::{Reencode, RoundtripReencoder};
use wasm_encoder::{BlockType, Instruction};
use wasmparser::Operator;

impl Writer<'_, '_> {
    /// An operator that a loop version omits: it is before the loop, or in another arm.
    pub(super) fn skip(&mut self, position: usize) -> Result<(), InstrumentError> {
        let body = self.plan.body;
        match &body.ops[position] {
            op @ (Operator::Block { .. } | Operator::Loop { .. } | Operator::If { .. }) => {
                let construct = &body.constructs[self.next_construct];
                if let Version::Loop { point, .. } = self.version
                    && !self.has_begun
                    && construct.points.contains(&point)
                {
                    if construct.polls && construct.points.start == point {
                        self.has_begun = true;
                        return self.open_construct(op);
                    }
                    self.open_around(op)?;
                } else {
                    self.next_construct += 1;
                    self.open.push(Open {
                        label: self.labels,
                        construct: None,
                        sequence: 0,
                        polls: false,
                        shape: Shape::Nothing,
                        is_skipping: false,
                        is_loop: false,
                        is_wanted: false,
                        first_ends: false,
                    });
                }
            }
            Operator::Else if self.has_begun && self.is_dead => {
                // (For an arm that ends early.)
                let frame = self.open.last();
                if frame.is_some_and(|it| it.shape != Shape::Nothing && !it.is_skipping) {
                    self.op(position)?;
                }
            }
            Operator::End => {
                if self
                    .open
                    .last()
                    .is_some_and(|it| it.shape == Shape::Nothing)
                {
                    self.open.pop();
                } else {
                    // (The other arm of an enclosing `if` was omitted.)
                    self.op(position)?;
                }
            }
            _ => {}
        }
        let point = body.points.get(self.next_point);
        if point.is_some_and(|point| point.op == Some(position)) {
            self.next_point += 1;
        }
        Ok(())
    }

    /// Opens a construct around the entered loop. Operands below it are in temporaries; its
    /// parameters are consumed.
    fn open_around(&mut self, op: &Operator<'_>) -> Result<(), InstrumentError> {
        let number = self.next_construct;
        self.next_construct += 1;
        let construct = &self.plan.body.constructs[number];
        let (below, params) = construct
            .operands
            .split_at(construct.operands.len() - construct.params);
        self.reload(below, construct.base);
        for ty in params {
            self.i(&zero(*ty));
        }
        let ty = match op {
            Operator::Block { blockty } | Operator::Loop { blockty } | Operator::If { blockty } => {
                RoundtripReencoder.block_type(*blockty)?
            }
            _ => BlockType::Empty,
        };
        self.i(&Instruction::Block(ty));
        self.labels += 1;
        for _ in params {
            self.i(&Instruction::Drop);
        }
        let mut shape = Shape::Around;
        if matches!(op, Operator::Loop { .. }) {
            shape = Shape::LoopAround;
            let ty = self.types.block(&[], params)?;
            self.i(&Instruction::Block(ty));
            self.labels += 1;
        }
        self.open.push(Open {
            label: self.labels - 1,
            construct: Some(number),
            sequence: construct.sequences[0],
            polls: false,
            shape,
            is_skipping: false,
            is_loop: shape == Shape::LoopAround,
            is_wanted: false,
            first_ends: false,
        });
        Ok(())
    }

    /// The end of an enclosing loop: falling out continues behind it, a branch to its header
    /// leaves.
    pub(super) fn close_around(&mut self, construct: usize) -> Result<(), InstrumentError> {
        let construct = &self.plan.body.constructs[construct];
        self.i(&Instruction::Br(1));
        self.i(&Instruction::End);
        self.labels -= 1;
        let number = construct.points.start as usize;
        let point = &self.plan.body.points[number];
        if !construct.polls {
            return Err(InstrumentError::Malformed(
                "a loop does not poll that is around one that does".into(),
            ));
        }
        let (visible, operands) = visible(point);
        self.spill(&visible[..operands], point.outer);
        self.exit(number, self.labels);
        Ok(())
    }

    /// Whether the innermost construct encloses the entered loop.
    pub(super) fn is_around(&self) -> bool {
        self.open
            .last()
            .is_some_and(|frame| frame.shape == Shape::Around)
    }
}
