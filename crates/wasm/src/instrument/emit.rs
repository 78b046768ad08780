//! Writes the versions of a function.
//!
//! The *hot* version is the original function with polls, status checks and cold code that saves a
//! frame and returns. The *clone* can be entered at any point: it jumps forward to the point (each
//! sequence of code on the way begins with a branch over the code before the landing), and
//! continues to the function's end, or to the next header of a polling loop, where it leaves. Each
//! of those loops has a *loop version*, which is entered at that header only, so within the loop it
//! is as fast as the hot version; it continues to the function's end, or to the header of an
//! enclosing loop, where it leaves in turn. The runtime immediately continues in that loop's
//! version: a thread resumed inside loops leaves the clone at the end of the current iteration.
//! Where that would produce too much code (many loops among much other code) the clone contains its
//! loops itself, with landings in front of them. (Such a clone has a second entry into each loop,
//! and keeps values in memory that the hot version keeps in registers: a third of the speed.) The
//! runtime calls clones one frame at a time, innermost first, and passes each the results of the
//! previous one; so no native stack is ever rebuilt.
//!
//! In a clone every value that is live across a landing is in a local: originals in their own,
//! operands in *temporaries*, one per height and type.
//!
//! - `landing`: entering a clone at a point
//! - `enclosing_code`: what a loop version keeps of the code around its loop
//! - `poll`: polls, and leaving at a point
//! - `exit`: the cold code that saves a frame and leaves
//! - `spill`: points with more operands than a block may have
//! - `call`: calls and references

mod call;
mod enclosing_code;
mod exit;
mod landing;
mod poll;
mod spill;

use super::body::{Construct, Point, PointKind, ends_here};
use super::callees::SegmentOp;
use super::error::InstrumentError;
use super::meta::{self, SlotType, slot_type};
use super::plan::{BlockTypes, Plan, RESULT};
use wasm_encoder::reencode::{Reencode, RoundtripReencoder};
use wasm_encoder::{BlockType, BranchHint, Function, Instruction, MemArg, MemArgTarget};
use wasmparser::{Operator, ValType};

/// A function, and hints for its cold branches.
pub(crate) type Written = (Function, Vec<BranchHint>);

impl Plan<'_> {
    /// The hot version, with hints for its cold branches.
    pub(crate) fn hot(&self, types: &mut BlockTypes) -> Result<Written, InstrumentError> {
        Writer::new(self, Version::Hot, types)?.write()
    }

    /// The clone: `(resume number) -> status`. `first_loop` is the function index of the first of
    /// [`Self::loops`]; with `None` the clone contains its loops itself.
    pub(crate) fn clone_version(
        &self,
        types: &mut BlockTypes,
        first_loop: Option<u32>,
    ) -> Result<Written, InstrumentError> {
        Writer::new(self, Version::Clone { first_loop }, types)?.write()
    }

    /// The points at loop headers.
    pub(crate) fn loops(&self) -> impl Iterator<Item = u32> {
        let points = (0..).zip(&self.body.points);
        points.filter_map(|(number, point)| (point.kind == PointKind::Loop).then_some(number))
    }

    /// The loop versions ([`Self::loops`]), of the clone's type. Inner loops are part of the
    /// versions of all enclosing ones, and the code behind a loop is part of its version: where
    /// that is too much code, each version contains only its own code, and leaves for inner loops
    /// as well; `None` where even that is too much.
    pub(crate) fn loop_versions(
        &self,
        types: &mut BlockTypes,
        hot_bytes: usize,
    ) -> Result<Option<Vec<Written>>, InstrumentError> {
        let bounds = [
            (false, LOOPS_FACTOR * hot_bytes + LOOPS_BYTES),
            (true, LEAN_FACTOR * hot_bytes + LEAN_BYTES),
        ];
        for (is_lean, most) in bounds {
            let (mut versions, mut bytes) = (Vec::new(), 0);
            for point in self.loops() {
                let version = Version::Loop { point, is_lean };
                let written = Writer::new(self, version, types)?.write()?;
                bytes += written.0.byte_len();
                versions.push(written);
                if bytes > most {
                    break;
                }
            }
            if bytes <= most {
                return Ok(Some(versions));
            }
        }
        Ok(None)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Hot,
    Clone { first_loop: Option<u32> },
    Loop { point: u32, is_lean: bool },
}

/// Maximum bytes of all loop versions of a function: a factor of its own size plus a constant; and
/// the values where each version contains only its own code.
const LOOPS_FACTOR: usize = 8;
const LOOPS_BYTES: usize = 64 << 10;
const LEAN_FACTOR: usize = 16;
const LEAN_BYTES: usize = 64 << 10;

/// Representation of an open construct in the output.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Same,
    /// Omitted, with its contents.
    Nothing,
    /// A block around the entered loop.
    Around,
    /// Two blocks around the entered loop: the outer one ends at the code behind the loop, the
    /// inner one at its header.
    LoopAround,
}

/// An open construct of the original function.
struct Open {
    /// Index of its label among all open labels of the output.
    label: u32,
    construct: Option<usize>,
    /// Sequence being written.
    sequence: usize,
    /// Whether it is a loop with a poll at its header.
    polls: bool,
    shape: Shape,
    /// The rest is omitted: it is the other arm of an enclosing `if`, or a loop of a clone behind
    /// its header.
    is_skipping: bool,
    is_loop: bool,
    /// A branch targets its label, and the label is behind it.
    is_wanted: bool,
    /// It is an `if` whose first arm can reach its end, or may be the only one.
    first_ends: bool,
}

struct Writer<'a, 'p> {
    plan: &'p Plan<'a>,
    version: Version,
    types: &'p mut BlockTypes,
    out: Function,
    hints: Vec<BranchHint>,
    /// Labels open in the output, including the function's.
    labels: u32,
    open: Vec<Open>,
    next_construct: usize,
    next_point: usize,
    scratch: u32,
    /// Local of the address of the frame being saved.
    frame: u32,
    /// Exits that some point of this version uses.
    used_exits: Vec<bool>,
    /// Local of a loop version, or of a clone that contains its loops: a mask with all bits set, or
    /// none until the header at which it was resumed is passed, so that it does not leave again.
    mask: u32,
    /// Whether the loop version has reached its loop.
    has_begun: bool,
    /// Unreachable in a loop version: nothing is written.
    is_dead: bool,
    /// The loop version has passed its loop's end.
    is_over: bool,
    body_label: u32,
}

impl<'a, 'p> Writer<'a, 'p> {
    fn new(
        plan: &'p Plan<'a>,
        version: Version,
        types: &'p mut BlockTypes,
    ) -> Result<Self, InstrumentError> {
        let body = plan.body;
        let own = match version {
            Version::Hot => &body.locals[body.params..],
            Version::Clone { .. } | Version::Loop { .. } => &body.locals[..],
        };
        let mut locals: Vec<(u32, wasm_encoder::ValType)> = Vec::new();
        let all =
            own.iter()
                .chain(&plan.temp_types)
                .chain(&[ValType::I32, ValType::I32, ValType::I32]);
        for ty in all {
            let ty = RoundtripReencoder.val_type(*ty)?;
            match locals.last_mut() {
                Some((count, last)) if *last == ty => *count += 1,
                _ => locals.push((1, ty)),
            }
        }
        let shift = u32::from(version != Version::Hot);
        let first_own = shift + (body.locals.len() + plan.temp_types.len()) as u32;
        Ok(Writer {
            plan,
            version,
            types,
            out: Function::new(locals),
            hints: Vec::new(),
            labels: 1,
            open: Vec::new(),
            next_construct: 0,
            next_point: 0,
            scratch: first_own,
            mask: first_own + 1,
            frame: first_own + 2,
            used_exits: vec![false; plan.exits.len()],
            has_begun: !matches!(version, Version::Loop { .. }),
            is_dead: false,
            is_over: false,
            body_label: exit::body_label(plan),
        })
    }

    /// Whether it is a clone that contains its loops.
    fn has_loops(&self) -> bool {
        matches!(self.version, Version::Clone { first_loop: None })
    }

    /// Whether it can be entered at any point.
    fn lands(&self) -> bool {
        matches!(self.version, Version::Clone { .. })
    }

    fn write(mut self) -> Result<Written, InstrumentError> {
        let body = self.plan.body;
        match self.version {
            Version::Hot => {}
            Version::Clone { first_loop } => {
                if let Some(first_loop) = first_loop {
                    self.go_to_loops(first_loop);
                }
                self.load_at_entry()?;
            }
            Version::Loop { point, .. } => {
                let plan = self.plan;
                for slot in &plan.saved[point as usize] {
                    self.load_slot(*slot as usize)?;
                }
            }
        }
        self.open_exits();
        let ty = self.types.block(&[], &body.results)?;
        self.i(&Instruction::Block(ty));
        self.labels = self.body_label + 1;
        self.open.push(Open {
            label: self.body_label,
            construct: None,
            sequence: 0,
            polls: false,
            shape: Shape::Same,
            is_skipping: false,
            is_loop: false,
            is_wanted: false,
            first_ends: false,
        });
        self.open_sequence(&[], 0)?;
        let polls = body.points.first().is_some_and(|point| point.op.is_none());
        if polls && !self.has_begun {
            self.next_point += 1;
        } else if polls {
            // A separate memory, see `meta`.
            self.poll(self.plan.control + 1);
            self.leave_if()?;
            self.land_at_point();
        }
        for position in 0..body.ops.len() {
            let is_written = self.has_begun
                && !self.is_dead
                && self
                    .open
                    .last()
                    .is_none_or(|frame| frame.shape != Shape::Nothing && !frame.is_skipping);
            match is_written {
                true => self.op(position)?,
                false => self.skip(position)?,
            }
        }
        Ok((self.out, self.hints))
    }

    fn i(&mut self, instruction: &Instruction<'_>) -> &mut Self {
        self.out.instruction(instruction);
        self
    }

    fn konst(&mut self, value: u32) -> &mut Self {
        self.i(&Instruction::I32Const(value as i32))
    }

    /// The local of this version for an original local or a temporary.
    fn local(&self, local: u32) -> u32 {
        local + u32::from(self.version != Version::Hot)
    }

    fn get(&mut self, local: u32) {
        let local = self.local(local);
        self.i(&Instruction::LocalGet(local));
    }

    fn set(&mut self, local: u32) {
        let local = self.local(local);
        self.i(&Instruction::LocalSet(local));
    }

    fn control_arg(&self, offset: u32, align: u32) -> MemArg {
        MemArg {
            offset: offset.into(),
            align,
            target: MemArgTarget::Memory(self.plan.control),
            ordering: None,
        }
    }

    /// Stores `operands`, whose first has height `base`, into temporaries.
    fn spill(&mut self, operands: &[ValType], base: usize) {
        for (at, ty) in operands.iter().enumerate().rev() {
            let temp = self.plan.temps[&(base + at, *ty)];
            self.set(temp);
        }
    }

    fn reload(&mut self, operands: &[ValType], base: usize) {
        for (at, ty) in operands.iter().enumerate() {
            let temp = self.plan.temps[&(base + at, *ty)];
            self.get(temp);
        }
    }

    fn op(&mut self, position: usize) -> Result<(), InstrumentError> {
        let op = &self.plan.body.ops[position];
        match op {
            Operator::Block { .. } | Operator::Loop { .. } | Operator::If { .. } => {
                self.open_construct(op)?;
            }
            Operator::Else if self.is_around() => {
                let ends = !self.is_dead;
                if let Some(frame) = self.open.last_mut() {
                    frame.first_ends = ends;
                    frame.is_skipping = true;
                }
                self.is_dead = true;
            }
            Operator::Else => {
                self.i(&Instruction::Else);
                let ends = !self.is_dead;
                self.is_dead = false;
                if let Some(frame) = self.open.last_mut() {
                    frame.first_ends = ends;
                }
                if let Some(frame) = self.open.last_mut()
                    && let Some(construct) = frame.construct
                {
                    let construct = &self.plan.body.constructs[construct];
                    frame.sequence = construct.sequences[1];
                    self.open_arm(construct)?;
                }
            }
            Operator::End => {
                let frame = self.open.pop();
                let ended = frame.as_ref().and_then(|frame| frame.construct);
                self.is_over |= ended.is_some_and(|construct| !self.is_another(construct));
                if let Some(frame) = &frame
                    && frame.shape == Shape::LoopAround
                    && let Some(construct) = frame.construct
                {
                    self.close_around(construct)?;
                }
                self.i(&Instruction::End);
                self.labels -= 1;
                if self.open.is_empty() {
                    return self.finish();
                }
                if matches!(self.version, Version::Loop { .. }) {
                    self.is_dead &= !frame.is_some_and(|it| it.is_wanted || it.first_ends);
                    if self.is_dead {
                        // (The code behind an end counts as reachable.)
                        self.i(&Instruction::Unreachable);
                    }
                }
            }
            Operator::Br { relative_depth } => {
                let depth = self.depth(*relative_depth);
                self.i(&Instruction::Br(depth));
            }
            Operator::BrIf { relative_depth } => {
                let depth = self.depth(*relative_depth);
                self.i(&Instruction::BrIf(depth));
            }
            Operator::BrTable { targets } => {
                let all = targets
                    .targets()
                    .map(|target| target.map(|depth| self.depth(depth)))
                    .collect::<Result<Vec<u32>, _>>()?;
                let default = self.depth(targets.default());
                self.i(&Instruction::BrTable(all.into(), default));
            }
            Operator::Return => self.write_return(),
            Operator::Call { function_index } => self.call(*function_index)?,
            Operator::CallIndirect {
                type_index,
                table_index,
            } => {
                self.i(&Instruction::CallIndirect {
                    type_index: self.plan.status_types + type_index,
                    table_index: *table_index,
                });
                self.leave_if()?;
                self.land_at_point();
            }
            Operator::ReturnCall { function_index } => self.tail_call(*function_index)?,
            Operator::ReturnCallIndirect {
                type_index,
                table_index,
            } => {
                let type_index = self.plan.status_types + type_index;
                let table_index = *table_index;
                if self.version == Version::Hot {
                    self.i(&Instruction::ReturnCallIndirect {
                        type_index,
                        table_index,
                    });
                } else {
                    self.i(&Instruction::CallIndirect {
                        type_index,
                        table_index,
                    });
                    self.after_clone_tail_call();
                }
            }
            Operator::LocalGet { local_index } => self.get(*local_index),
            Operator::LocalSet { local_index } => self.set(*local_index),
            Operator::LocalTee { local_index } => {
                let local = self.local(*local_index);
                self.i(&Instruction::LocalTee(local));
            }
            Operator::RefFunc { function_index } if self.version != Version::Hot => {
                self.reference(*function_index)?;
            }
            other => self.other(other)?,
        }
        if ends_here(op) && matches!(self.version, Version::Loop { .. }) {
            self.is_dead = true;
        }
        Ok(())
    }

    fn other(&mut self, op: &Operator<'_>) -> Result<(), InstrumentError> {
        if self.version != Version::Hot
            && let Some(segment_op) = SegmentOp::of(op)
        {
            let function = self.plan.callees.segment_op(segment_op);
            let function = function.ok_or_else(|| missing("an operation on a segment"))?;
            self.i(&Instruction::Call(function));
            return Ok(());
        }
        let instruction = RoundtripReencoder.instruction(op.clone())?;
        self.i(&instruction);
        Ok(())
    }

    /// Relative depth in the output of an original label.
    fn depth(&mut self, original: u32) -> u32 {
        let at = self.open.len() - 1 - original as usize;
        let frame = &mut self.open[at];
        // (A loop's label is at its header.)
        frame.is_wanted |= !frame.is_loop;
        self.labels - 1 - frame.label
    }

    fn open_construct(&mut self, op: &Operator<'_>) -> Result<(), InstrumentError> {
        let number = self.next_construct;
        self.next_construct += 1;
        let construct = &self.plan.body.constructs[number];
        let is_if = matches!(op, Operator::If { .. });
        if !construct.points.is_empty() {
            let mut operands = construct.operands.clone();
            if is_if {
                operands.push(ValType::I32);
            }
            let below = construct.operands.len() - construct.params;
            if !self.is_another(number) {
                // (Its operands are in temporaries.)
                self.reload(&construct.operands, construct.base);
            } else if self.lands() && (self.has_loops() || !construct.is_simple_loop()) {
                if construct.is_simple_loop() {
                    self.land_at_simple_loop(&operands, construct.base)?;
                } else {
                    self.land(&operands, construct.base);
                }
                self.reload(&construct.operands, construct.base);
                if is_if {
                    self.choose_arm(construct);
                }
            } else if below > 0 {
                // Code inside cannot reach the operands below it.
                self.spill(&operands, construct.base);
                self.reload(&operands, construct.base);
            }
        }
        if construct.polls && !construct.is_simple_loop() && self.has_loops() {
            self.arrive_at_loop()?;
        }
        let instruction = RoundtripReencoder.instruction(op.clone())?;
        self.i(&instruction);
        self.open.push(Open {
            label: self.labels,
            construct: Some(number),
            sequence: construct.sequences[0],
            polls: construct.polls,
            shape: Shape::Same,
            is_skipping: false,
            is_loop: matches!(op, Operator::Loop { .. }),
            is_wanted: false,
            // (Without an else arm, if the condition is false.)
            first_ends: is_if,
        });
        self.labels += 1;
        self.open_arm(construct)?;
        if construct.polls {
            self.poll_loop(number)
        } else {
            Ok(())
        }
    }

    fn open_arm(&mut self, construct: &Construct) -> Result<(), InstrumentError> {
        let params = &construct.operands[construct.operands.len() - construct.params..];
        let base = construct.base + construct.operands.len() - construct.params;
        self.open_sequence(params, base)
    }

    /// Whether a construct is not the loop that a loop version enters.
    fn is_another(&self, construct: usize) -> bool {
        let construct = &self.plan.body.constructs[construct];
        match self.version {
            Version::Loop { point, .. } => !construct.polls || construct.points.start != point,
            Version::Hot | Version::Clone { .. } => true,
        }
    }

    fn cold_if(&mut self, ty: BlockType) {
        self.hint_unlikely();
        self.i(&Instruction::If(ty));
    }

    /// In front of a branch that is seldom taken.
    fn hint_unlikely(&mut self) {
        self.hints.push(BranchHint {
            branch_func_offset: self.out.byte_len() as u32,
            branch_hint_value: 0,
        });
    }

    fn write_return(&mut self) {
        if self.version == Version::Hot {
            if self.plan.graph.has_status(self.plan.function) {
                self.konst(0);
            }
            self.i(&Instruction::Return);
        } else {
            let depth = self.labels - 1 - self.body_label;
            self.i(&Instruction::Br(depth));
        }
    }

    /// Behind the body's block: the results, then the status.
    fn finish(&mut self) -> Result<(), InstrumentError> {
        if self.version == Version::Hot {
            if self.plan.body.points.is_empty() {
                if self.plan.graph.has_status(self.plan.function) {
                    self.konst(0);
                }
            } else {
                self.konst(0).i(&Instruction::Return);
                self.close_exits()?;
            }
            self.i(&Instruction::End);
            return Ok(());
        }
        // Results were on the stack only: one local per type carries them, the last result first.
        for (at, ty) in self.plan.body.results.iter().enumerate().rev() {
            let temp = self.plan.temps[&(RESULT, *ty)];
            let local = self.local(temp);
            self.i(&Instruction::LocalSet(local));
            if slot_type(*ty)? == SlotType::FuncRef {
                self.konst(at as u32);
                self.i(&Instruction::LocalGet(local));
                self.i(&Instruction::TableSet(self.plan.refs));
            } else {
                let arg = self.control_arg(meta::RESULTS + 16 * at as u32, 0);
                self.konst(0);
                self.i(&Instruction::LocalGet(local));
                self.i(&store(*ty, arg));
            }
        }
        self.konst(0).i(&Instruction::Return);
        self.close_exits()?;
        self.i(&Instruction::End);
        Ok(())
    }
}

/// Types of the operands of the innermost frame at a point, a call's results
/// last, and how many there are without those.
fn visible(point: &Point) -> (Vec<ValType>, usize) {
    let mut visible = point.operands[point.outer..].to_vec();
    let operands = visible.len();
    visible.extend(&point.results);
    (visible, operands)
}

fn store(ty: ValType, arg: MemArg) -> Instruction<'static> {
    match ty {
        ValType::I64 => Instruction::I64Store(arg),
        ValType::F32 => Instruction::F32Store(arg),
        ValType::F64 => Instruction::F64Store(arg),
        ValType::V128 => Instruction::V128Store(arg),
        ValType::I32 | ValType::Ref(_) => Instruction::I32Store(arg),
    }
}

fn zero(ty: ValType) -> Instruction<'static> {
    match ty {
        ValType::I32 => Instruction::I32Const(0),
        ValType::I64 => Instruction::I64Const(0),
        ValType::F32 => Instruction::F32Const(0.0_f32.into()),
        ValType::F64 => Instruction::F64Const(0.0_f64.into()),
        ValType::V128 => Instruction::V128Const(0),
        ValType::Ref(_) => Instruction::RefNull(wasm_encoder::HeapType::FUNC),
    }
}

fn missing(what: &str) -> InstrumentError {
    InstrumentError::Malformed(format!("{what} was not found in the first reading"))
}
