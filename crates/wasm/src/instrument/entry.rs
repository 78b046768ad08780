//! What a clone, or a loop version, executes from one of its entries until it leaves for a loop.
//!
//! A clone can be entered at each of its points, and a large one takes long to compile. But a frame
//! is resumed at one point, and a thread leaves the clone at the next loop header. So with the resume
//! number as a constant, most of the code is unreachable: from a point in the loop of an interpreter
//! that is all but the rest of one instruction. A loop version is reduced in the same way: entered
//! to leave at the first header of another loop.
//!
//! This is constant propagation of one local, and removal of unreachable code, over structured
//! control flow. It knows the forms in which `emit` writes its branches:
//!
//! ```text
//!   local.get 0; br_if L                                      is it a resume?
//!   local.get 0; i32.eqz; br_if L
//!   local.get 0; i32.const C; i32.le_u; br_if L               to which landing?
//!   local.get 0; i32.const C; i32.sub; br_table …
//!   local.get 0; i32.const C; i32.eq; if                      to a loop
//!   local.get 0; i32.const C; i32.le_u; local.get X; local.get 0; select; if
//!   i32.const 1; i32.const P; local.set S; br_if L            leave at a loop header
//!   i32.const 1; if
//!   i32.const 0; i32.atomic.load REQUEST; …                   poll at a loop header
//! ```
//!
//! What has another form stays as it is, which is correct in any case.

use super::error::InstrumentError;
use std::collections::BTreeSet;
use std::convert::Infallible;
use wasm_encoder::reencode::Reencode;
use wasm_encoder::{BlockType, BranchHint, Function, Instruction};
use wasmparser::{FunctionBody, MemArgTarget, Operator};

/// The code of a clone or of a loop version: its operators, and where its constructs end.
pub(super) struct Code<'a> {
    bytes: usize,
    locals: Vec<(u32, wasmparser::ValType)>,
    ops: Vec<Op<'a>>,
}

struct Op<'a> {
    op: Operator<'a>,
    /// Whether a branch is likely, if that is known.
    hint: Option<bool>,
    /// Of a `block`, `loop` or `if`: where it ends.
    end: usize,
    /// Of an `if`: its `else`, if it has one.
    other: Option<usize>,
}

fn malformed(what: &str) -> InstrumentError {
    InstrumentError::Malformed(what.into())
}

impl<'a> Code<'a> {
    /// Reads a body. `hints` are those of its branches by offset, in order.
    ///
    /// # Errors
    /// [`InstrumentError`] if it is not well-formed.
    pub(super) fn read(
        body: &FunctionBody<'a>,
        hints: &[(u32, bool)],
    ) -> Result<Self, InstrumentError> {
        let locals = body.get_locals_reader()?.into_iter();
        let locals = locals.collect::<Result<_, _>>()?;
        let mut hints = hints.iter().peekable();
        let start = body.range().start;
        let bytes = body.as_bytes().len();
        let (mut ops, mut open): (Vec<Op<'a>>, Vec<usize>) = (Vec::new(), Vec::new());
        for op in body.get_operators_reader()?.into_iter_with_offsets() {
            let (op, offset) = op?;
            let hint = hints.next_if(|(at, _)| u64::from(*at) == offset - start);
            let at = ops.len();
            match op {
                Operator::Block { .. } | Operator::Loop { .. } | Operator::If { .. } => {
                    open.push(at);
                }
                Operator::Else => {
                    let first = open.last().and_then(|first| ops.get_mut(*first));
                    first
                        .ok_or_else(|| malformed("an else without an if"))?
                        .other = Some(at);
                }
                // Its identity would be another one here.
                Operator::RefFunc { .. } => return Err(malformed("a clone names a reference")),
                Operator::End => {
                    // (The last one ends the function.)
                    if let Some(first) = open.pop() {
                        ops[first].end = at;
                    }
                }
                _ => {}
            }
            ops.push(Op {
                op,
                hint: hint.map(|(_, taken)| *taken),
                end: at,
                other: None,
            });
        }
        match (open.is_empty(), ops.last()) {
            (true, Some(last)) if matches!(last.op, Operator::End) => {
                Ok(Code { bytes, locals, ops })
            }
            _ => Err(malformed("a function does not end")),
        }
    }

    /// The loop versions of a clone, in front of its code: the resume number of each, and its
    /// function index.
    pub(super) fn loop_versions(&self) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        let mut at = 0;
        while let Some((number, function)) = self.loop_version(at) {
            found.push((number, function));
            at += LOOP_VERSION_OPS;
        }
        found
    }

    fn loop_version(&self, at: usize) -> Option<(u32, u32)> {
        let ops = self.ops.get(at..at + LOOP_VERSION_OPS)?;
        match [
            &ops[0].op, &ops[1].op, &ops[2].op, &ops[3].op, &ops[4].op, &ops[5].op, &ops[6].op,
        ] {
            [
                Operator::LocalGet { local_index: 0 },
                Operator::I32Const { value },
                Operator::I32Eq,
                Operator::If { .. },
                Operator::LocalGet { local_index: 0 },
                Operator::ReturnCall { function_index },
                Operator::End,
            ] => Some((*value as u32, *function_index)),
            _ => None,
        }
    }

    /// Its code as it is; without the way to loop versions that a clone begins with, unless
    /// `with_loop_versions`.
    ///
    /// # Errors
    /// [`InstrumentError`] if it is not well-formed.
    pub(super) fn write<R: Reencode<Error = Infallible>>(
        &self,
        reencode: &mut R,
        with_loop_versions: bool,
    ) -> Result<(Function, Vec<BranchHint>), InstrumentError> {
        let skipped = match with_loop_versions {
            true => 0,
            false => LOOP_VERSION_OPS * self.loop_versions().len(),
        };
        let mut out = Function::new(self.locals(reencode)?);
        let mut hints = Vec::new();
        for op in self.ops.iter().skip(skipped) {
            if let Some(taken) = op.hint {
                hints.push(BranchHint {
                    branch_func_offset: out.byte_len() as u32,
                    branch_hint_value: u32::from(taken),
                });
            }
            let instruction = reencode.instruction(op.op.clone());
            out.instruction(&instruction?);
        }
        Ok((out, hints))
    }

    fn locals<R: Reencode<Error = Infallible>>(
        &self,
        reencode: &mut R,
    ) -> Result<Vec<(u32, wasm_encoder::ValType)>, InstrumentError> {
        let locals = self.locals.iter();
        locals
            .map(|(count, ty)| Ok((*count, reencode.val_type(*ty)?)))
            .collect()
    }
}

/// Length of what `emit` writes for each loop version in front of a clone's code.
const LOOP_VERSION_OPS: usize = 7;

/// The reachable code of an entry.
pub(super) struct Entry {
    pub(super) function: Function,
    pub(super) hints: Vec<BranchHint>,
    /// Points of the loop headers at which it leaves, among all points of the module.
    pub(super) next: BTreeSet<u32>,
}

/// What is known of local 0, the resume number, where code is reachable: the number itself before the
/// point, and zero behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Known(u32),
    Unknown,
}

fn join(one: Option<Number>, other: Option<Number>) -> Option<Number> {
    match (one, other) {
        (Some(one), Some(other)) if one != other => Some(Number::Unknown),
        (Some(number), _) | (None, Some(number)) => Some(number),
        (None, None) => None,
    }
}

/// A construct of the original that is open. (A list, not recursion: a clone has a block for each point, so
/// constructs may be thousands deep.)
struct Open {
    shape: Shape,
    /// Its label among all that are open in the output.
    label: u32,
    /// What is known where a branch arrives at its label; `None` without one.
    reached: Option<Number>,
    /// Where its operators begin, and the present sequence of them ends.
    first: usize,
    limit: usize,
    /// Where it ends.
    end: usize,
}

#[derive(Clone, Copy)]
enum Shape {
    Function,
    Block,
    Loop,
    /// The first arm of an `if`, with what was known in front of it.
    If {
        before: Option<Number>,
    },
    /// The second arm, with what is known behind the first.
    Else {
        first: Option<Number>,
    },
    /// The first time through a loop that is entered on the way to a point, in two blocks: of the outer one
    /// the end is behind the loop, of the inner one at its header.
    OnTheWay {
        ty: BlockType,
    },
    /// All further times, with what is known behind the first.
    Further {
        first: Option<Number>,
    },
}

struct Writer<'b, 'a, R> {
    ops: &'b [Op<'a>],
    reencode: &'b mut R,
    out: Function,
    hints: Vec<BranchHint>,
    open: Vec<Open>,
    /// Labels open in the output.
    labels: u32,
    /// `None` where code is unreachable: nothing is written there.
    number: Option<Number>,
    /// The memory whose polls are at loop headers, if it leaves there.
    polled: Option<u32>,
    next: BTreeSet<u32>,
}

/// The part of `code` that is reached from an entry: of a clone with the resume number of a point, or of a
/// loop version, which has one entry only and leaves at the headers of other loops (their polls are of
/// the memory `polled`). `None` if it becomes larger than all of the code: loops within loops are written
/// more than once.
///
/// # Errors
/// [`InstrumentError`] if the body is not well-formed.
pub(super) fn of<R: Reencode<Error = Infallible>>(
    code: &Code<'_>,
    number: Option<u32>,
    polled: Option<u32>,
    reencode: &mut R,
) -> Result<Option<Entry>, InstrumentError> {
    let out = Function::new(code.locals(reencode)?);
    let mut writer = Writer {
        ops: &code.ops,
        reencode,
        out,
        hints: Vec::new(),
        open: Vec::new(),
        labels: 0,
        number: Some(number.map_or(Number::Unknown, Number::Known)),
        polled,
        next: BTreeSet::new(),
    };
    let is_written = writer.write(code.ops.len() - 1, code.bytes)?;
    Ok(is_written.then_some(Entry {
        function: writer.out,
        hints: writer.hints,
        next: writer.next,
    }))
}

impl<R: Reencode<Error = Infallible>> Writer<'_, '_, R> {
    fn i(&mut self, instruction: &Instruction<'_>) {
        self.out.instruction(instruction);
    }

    fn op(&self, at: usize) -> Option<&Operator<'_>> {
        self.ops.get(at).map(|op| &op.op)
    }

    /// All operators up to the function's end, at `end`; false if they take more bytes than `most`.
    fn write(&mut self, end: usize, most: usize) -> Result<bool, InstrumentError> {
        self.labels = 1;
        self.enter(Shape::Function, 0, (0, end, end));
        let mut at = 0;
        while let Some(open) = self.open.last() {
            at = match at < open.limit && self.number.is_some() {
                true => self.step(at)?,
                false => self.leave_construct(),
            };
            if self.out.byte_len() > most {
                return Ok(false);
            }
        }
        self.i(&Instruction::End);
        Ok(true)
    }

    /// One operator, or several of a known form; where to go on.
    fn step(&mut self, at: usize) -> Result<usize, InstrumentError> {
        if let Some(next) = self.known_form(at)? {
            return Ok(next);
        }
        let op = &self.ops[at];
        if let Some(taken) = op.hint {
            self.hint(taken);
        }
        match &op.op {
            Operator::Block { blockty } => return self.block(at, *blockty),
            Operator::Loop { blockty } => return self.repeat(at, *blockty),
            Operator::If { blockty } => return self.either(at, *blockty),
            Operator::Br { relative_depth } => self.branch(*relative_depth)?,
            Operator::BrIf { relative_depth } => {
                let depth = self.reach(*relative_depth)?;
                self.i(&Instruction::BrIf(depth));
            }
            Operator::BrTable { targets } => {
                let mut all = Vec::new();
                for target in targets.targets() {
                    all.push(self.reach(target?)?);
                }
                let default = self.reach(targets.default())?;
                self.i(&Instruction::BrTable(all.into(), default));
                self.number = None;
            }
            Operator::LocalSet { local_index: 0 } | Operator::LocalTee { local_index: 0 } => {
                self.plain(at)?;
                self.number = Some(match self.is_zero(at) {
                    true => Number::Known(0),
                    false => Number::Unknown,
                });
            }
            other => {
                let ends = super::body::ends_here(other);
                self.plain(at)?;
                if ends {
                    self.number = None;
                }
            }
        }
        Ok(at + 1)
    }

    fn plain(&mut self, at: usize) -> Result<(), InstrumentError> {
        let instruction = self.reencode.instruction(self.ops[at].op.clone());
        let instruction = instruction?;
        self.out.instruction(&instruction);
        Ok(())
    }

    fn hint(&mut self, taken: bool) {
        self.hints.push(BranchHint {
            branch_func_offset: self.out.byte_len() as u32,
            branch_hint_value: u32::from(taken),
        });
    }

    /// Whether what is stored at `at` is the constant zero, perhaps through another local.
    fn is_zero(&self, at: usize) -> bool {
        let is_zero = |at: usize| matches!(self.op(at), Some(Operator::I32Const { value: 0 }));
        let before = |by: usize| at.checked_sub(by);
        match before(1).and_then(|at| self.op(at)) {
            Some(Operator::LocalTee { .. }) => before(2).is_some_and(is_zero),
            _ => before(1).is_some_and(is_zero),
        }
    }

    /// The depth in the output of a label that is branched to.
    fn reach(&mut self, depth: u32) -> Result<u32, InstrumentError> {
        let number = self.number;
        let open = self.open.len().checked_sub(1 + depth as usize);
        let open = open.and_then(|open| self.open.get_mut(open));
        let open = open.ok_or_else(|| malformed("a branch has no target"))?;
        open.reached = join(open.reached, number);
        Ok(self.labels - 1 - open.label)
    }

    fn branch(&mut self, depth: u32) -> Result<(), InstrumentError> {
        let depth = self.reach(depth)?;
        self.i(&Instruction::Br(depth));
        self.number = None;
        Ok(())
    }

    /// Opens a label in the output.
    fn open(&mut self, instruction: &Instruction<'_>) -> u32 {
        self.i(instruction);
        self.labels += 1;
        self.labels - 1
    }

    /// Closes one; `number` is what is known behind it.
    fn close(&mut self, number: Option<Number>) {
        self.i(&Instruction::End);
        self.labels -= 1;
        self.number = number;
        if number.is_none() {
            // (The code behind an end counts as reachable.)
            self.i(&Instruction::Unreachable);
        }
    }

    /// Begins a construct of the original; where to go on.
    fn enter(
        &mut self,
        shape: Shape,
        label: u32,
        (first, limit, end): (usize, usize, usize),
    ) -> usize {
        self.open.push(Open {
            shape,
            label,
            reached: None,
            first,
            limit,
            end,
        });
        first
    }

    /// Ends a sequence of the innermost construct, and perhaps the construct; where to go on.
    fn leave_construct(&mut self) -> usize {
        let Some(open) = self.open.pop() else {
            return 0;
        };
        let Open {
            label,
            reached,
            first,
            limit,
            end,
            ..
        } = open;
        match open.shape {
            Shape::Function => return end,
            Shape::Block => self.close(join(self.number, reached)),
            Shape::Loop => self.close(self.number),
            Shape::If { before } if limit < end => {
                let first = join(self.number, reached);
                self.i(&Instruction::Else);
                self.number = before;
                return self.enter(Shape::Else { first }, label, (limit + 1, end, end));
            }
            // (Where its condition is false.)
            Shape::If { before } => self.close(join(join(self.number, reached), before)),
            Shape::Else { first } => self.close(join(join(self.number, reached), first)),
            Shape::OnTheWay { ty } => {
                let falls = self.number;
                if falls.is_some() {
                    self.i(&Instruction::Br(1));
                }
                self.close(reached);
                if reached.is_some() {
                    let label = self.open(&Instruction::Loop(ty));
                    let further = Shape::Further { first: falls };
                    return self.enter(further, label, (first, limit, end));
                }
                self.close(falls);
            }
            Shape::Further { first } => {
                let falls = self.number;
                self.close(falls);
                self.close(join(first, falls));
            }
        }
        end + 1
    }

    fn block_type(&mut self, ty: wasmparser::BlockType) -> Result<BlockType, InstrumentError> {
        Ok(self.reencode.block_type(ty)?)
    }

    fn block(&mut self, at: usize, ty: wasmparser::BlockType) -> Result<usize, InstrumentError> {
        let end = self.ops[at].end;
        let ty = self.block_type(ty)?;
        let label = self.open(&Instruction::Block(ty));
        Ok(self.enter(Shape::Block, label, (at + 1, end, end)))
    }

    /// A loop. One that is entered on the way to a point is written twice: the first time it comes in with
    /// the number, and each further time with zero.
    fn repeat(&mut self, at: usize, ty: wasmparser::BlockType) -> Result<usize, InstrumentError> {
        let end = self.ops[at].end;
        // (Without parameters, as a block then needs no other type.)
        let has_params = matches!(ty, wasmparser::BlockType::FuncType(_));
        let ty = self.block_type(ty)?;
        let is_on_the_way = matches!(self.number, Some(Number::Known(number)) if number != 0);
        if is_on_the_way && !has_params {
            self.open(&Instruction::Block(ty));
            let again = self.open(&Instruction::Block(BlockType::Empty));
            return Ok(self.enter(Shape::OnTheWay { ty }, again, (at + 1, end, end)));
        }
        if is_on_the_way {
            self.number = Some(Number::Unknown);
        }
        // (Nothing makes another number of zero.)
        let label = self.open(&Instruction::Loop(ty));
        Ok(self.enter(Shape::Loop, label, (at + 1, end, end)))
    }

    fn either(&mut self, at: usize, ty: wasmparser::BlockType) -> Result<usize, InstrumentError> {
        let (end, other) = (self.ops[at].end, self.ops[at].other);
        let ty = self.block_type(ty)?;
        let before = self.number;
        let label = self.open(&Instruction::If(ty));
        let limit = other.unwrap_or(end);
        Ok(self.enter(Shape::If { before }, label, (at + 1, limit, end)))
    }

    /// An `if` at `at` whose condition is known, and not on the stack.
    fn decided(&mut self, at: usize, condition: bool) -> Result<usize, InstrumentError> {
        let Operator::If { blockty } = self.ops[at].op else {
            return Err(malformed("a condition without an if"));
        };
        let (end, other) = (self.ops[at].end, self.ops[at].other);
        let (first, limit) = match (condition, other) {
            (true, other) => (at + 1, other.unwrap_or(end)),
            (false, Some(other)) => (other + 1, end),
            // Its parameters are its results.
            (false, None) => return Ok(end + 1),
        };
        let ty = self.block_type(blockty)?;
        let label = self.open(&Instruction::Block(ty));
        Ok(self.enter(Shape::Block, label, (first, limit, end)))
    }

    /// One of the forms in the module's description at `at`, if what is known decides it; where to go on.
    fn known_form(&mut self, at: usize) -> Result<Option<usize>, InstrumentError> {
        if let Some(behind) = self.leaves(at) {
            return self.leave(behind);
        }
        let (Some(Number::Known(number)), Some(Operator::LocalGet { local_index: 0 })) =
            (self.number, self.op(at))
        else {
            return Ok(None);
        };
        let (condition, behind) = match (self.op(at + 1), self.op(at + 2)) {
            (Some(Operator::BrIf { .. }), _) => (number != 0, at + 1),
            (Some(Operator::I32Eqz), Some(Operator::BrIf { .. })) => (number == 0, at + 2),
            (Some(Operator::I32Const { value }), Some(Operator::I32LeU)) => {
                (number <= *value as u32, at + 3)
            }
            (Some(Operator::I32Const { value }), Some(Operator::I32Eq)) => {
                (number == *value as u32, at + 3)
            }
            (Some(Operator::I32Const { value }), Some(Operator::I32Sub)) => {
                return self.table(at + 3, number.wrapping_sub(*value as u32));
            }
            _ => return Ok(None),
        };
        match (self.op(behind), self.op(behind + 1), self.op(behind + 2)) {
            (Some(Operator::BrIf { relative_depth }), ..) => {
                let depth = *relative_depth;
                if condition {
                    self.branch(depth)?;
                }
                Ok(Some(behind + 1))
            }
            (Some(Operator::If { .. }), ..) => self.decided(behind, condition).map(Some),
            // The arm of an `if`: that of the point, or the one that its own condition selects.
            (
                Some(Operator::LocalGet { .. }),
                Some(Operator::LocalGet { local_index: 0 }),
                Some(Operator::Select),
            ) if matches!(self.op(behind + 3), Some(Operator::If { .. })) => {
                if number == 0 {
                    self.plain(behind)?;
                    return Ok(Some(behind + 3));
                }
                self.decided(behind + 3, condition).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// A branch table at `at`, of which the entry is known.
    fn table(&mut self, at: usize, entry: u32) -> Result<Option<usize>, InstrumentError> {
        let Some(Operator::BrTable { targets }) = self.op(at) else {
            return Ok(None);
        };
        let target = targets.targets().nth(entry as usize).transpose()?;
        let target = target.unwrap_or(targets.default());
        self.branch(target)?;
        Ok(Some(at + 1))
    }

    /// Whether a condition at `at` says that the thread leaves at a loop header; where it is consumed.
    fn leaves(&self, at: usize) -> Option<usize> {
        match (self.op(at), self.op(at + 1)) {
            (Some(Operator::I32Const { value: 1 }), _) => Some(at + 1),
            (Some(Operator::I32Const { value: 0 }), Some(Operator::I32AtomicLoad { memarg }))
                if self
                    .polled
                    .is_some_and(|memory| memarg.target == MemArgTarget::Memory(memory)) =>
            {
                Some(at + 2)
            }
            _ => None,
        }
    }

    /// Leaves with a condition that holds and is consumed at `at`.
    fn leave(&mut self, at: usize) -> Result<Option<usize>, InstrumentError> {
        match (self.op(at), self.op(at + 1), self.op(at + 2)) {
            (Some(Operator::If { .. }), ..) => {
                self.note_point(at + 1, self.ops[at].end);
                self.decided(at, true).map(Some)
            }
            (
                Some(Operator::I32Const { .. }),
                Some(Operator::LocalSet { .. }),
                Some(Operator::BrIf { relative_depth }),
            ) => {
                let depth = *relative_depth;
                self.note_point(at, at + 2);
                self.plain(at)?;
                self.plain(at + 1)?;
                self.branch(depth)?;
                Ok(Some(at + 3))
            }
            _ => Ok(None),
        }
    }

    /// Notes the point of a loop header that is passed to an exit: the last constant between `first` and
    /// `end`, by the form of that code.
    fn note_point(&mut self, first: usize, end: usize) {
        let point = self.ops[first..end]
            .iter()
            .rev()
            .find_map(|op| match op.op {
                Operator::I32Const { value } => Some(value as u32),
                _ => None,
            });
        self.next.extend(point);
    }
}
