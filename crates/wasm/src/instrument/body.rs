//! Parses one function: its reachable operators, its constructs, and its safepoints with the types
//! of all operands there.
//!
//! Unreachable code is dropped here, so that later phases never meet a stack of unknown types.
//! `emit` writes the output.

use super::callgraph::CallGraph;
use super::error::InstrumentError;
use wasmparser::{
    BlockType, FuncValidator, FunctionBody, Operator, OperatorsReader, ValType, ValidatorResources,
    WasmModuleResources,
};

/// Operators of a loop's body that are searched for a call that polls.
const LOOKAHEAD_MAX: usize = 200;

/// Whether the rest of the construct is unreachable.
pub(crate) fn ends_here(op: &Operator<'_>) -> bool {
    matches!(
        op,
        Operator::Br { .. }
            | Operator::BrTable { .. }
            | Operator::Return
            | Operator::Unreachable
            | Operator::ReturnCall { .. }
            | Operator::ReturnCallIndirect { .. }
    )
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PointKind {
    /// Poll at the function's entry.
    Entry,
    /// Poll at a loop's header.
    Loop,
    /// Return from a call that may unwind.
    Call,
}

#[derive(Debug)]
pub(crate) struct Point {
    pub(crate) kind: PointKind,
    /// The operator before it; `None` at the entry.
    pub(crate) op: Option<usize>,
    /// Types of all operands at the point, from the bottom, without call results.
    pub(crate) operands: Vec<ValType>,
    /// Number of operands that belong to the constructs around the innermost one.
    pub(crate) outer: usize,
    /// Types of the call's results.
    pub(crate) results: Vec<ValType>,
}

#[derive(Debug)]
pub(crate) struct Construct {
    /// Types of the operands of the enclosing frame, from that frame's bottom, including its own
    /// parameters but not an `if`'s condition.
    pub(crate) operands: Vec<ValType>,
    /// Stack height of that frame's bottom.
    pub(crate) base: usize,
    /// Number of `operands` that are its parameters.
    pub(crate) params: usize,
    /// Points inside: `points.start..points.end`.
    pub(crate) points: std::ops::Range<u32>,
    /// First point of the else arm (the end of `points` without one).
    pub(crate) else_point: u32,
    /// Sequences of its first and of its else arm.
    pub(crate) sequences: [usize; 2],
    /// Whether it is a loop that polls at its header, its first point.
    pub(crate) polls: bool,
}

impl Construct {
    /// Whether it is a loop whose only point is its header.
    pub(crate) fn is_simple_loop(&self) -> bool {
        self.polls && self.points.len() == 1
    }
}

/// A place in a sequence that a resume must be able to jump to.
#[derive(Debug, Clone)]
pub(crate) struct Landing {
    pub(crate) points: std::ops::Range<u32>,
    /// Whether it is a loop whose only point is its header.
    pub(crate) is_simple_loop: bool,
}

#[derive(Debug)]
pub(crate) struct Body<'a> {
    /// Types of parameters and declared locals.
    pub(crate) locals: Vec<ValType>,
    pub(crate) params: usize,
    pub(crate) results: Vec<ValType>,
    pub(crate) ops: Vec<Operator<'a>>,
    pub(crate) points: Vec<Point>,
    /// In order of their starts.
    pub(crate) constructs: Vec<Construct>,
    /// Sequence 0 is the function's own.
    pub(crate) sequences: Vec<Vec<Landing>>,
}

struct Open {
    construct: Option<usize>,
    sequence: usize,
}

pub(crate) fn read<'a>(
    body: &FunctionBody<'a>,
    validator: &mut FuncValidator<ValidatorResources>,
    graph: &CallGraph,
    function: u32,
) -> Result<Body<'a>, InstrumentError> {
    validator.read_locals(&mut body.get_binary_reader())?;
    let mut reader = body.get_operators_reader()?;
    let mut polls = polling_loops(reader.clone(), graph)?.into_iter();
    let locals: Vec<ValType> = (0..validator.len_locals())
        .filter_map(|local| validator.get_local_type(local))
        .collect();
    let ty = graph.function_type(function);
    let mut out = Body {
        params: ty.params().len(),
        results: ty.results().to_vec(),
        locals,
        ops: Vec::new(),
        points: Vec::new(),
        constructs: Vec::new(),
        sequences: vec![Vec::new()],
    };
    let mut open = vec![Open {
        construct: None,
        sequence: 0,
    }];
    if graph.polls_at_entry(function) {
        out.point(PointKind::Entry, None, validator, &open, &[]);
    }
    // Depth of constructs opened inside unreachable code.
    let mut dead_depth: Option<u32> = None;
    while !reader.eof() {
        let offset = reader.original_position();
        let op = reader.read()?;
        if let Some(depth) = dead_depth {
            match op {
                Operator::Block { .. } | Operator::Loop { .. } | Operator::If { .. } => {
                    if matches!(op, Operator::Loop { .. }) {
                        polls.next();
                    }
                    dead_depth = Some(depth + 1);
                }
                Operator::End if depth > 0 => dead_depth = Some(depth - 1),
                Operator::End | Operator::Else if depth == 0 => dead_depth = None,
                _ => {}
            }
            if dead_depth.is_some() {
                validator.op(offset, &op)?;
                continue;
            }
        }
        let position = out.ops.len();
        match op {
            Operator::Block { blockty } | Operator::Loop { blockty } | Operator::If { blockty } => {
                let (params, _) = block_types(blockty, validator.resources());
                let condition = usize::from(matches!(op, Operator::If { .. }));
                let (all, base) = operands(validator);
                let sequence = out.sequences.len();
                out.sequences.push(Vec::new());
                let point = out.points.len() as u32;
                open.push(Open {
                    construct: Some(out.constructs.len()),
                    sequence,
                });
                out.constructs.push(Construct {
                    operands: all[base..all.len() - condition].to_vec(),
                    base,
                    params: params.len(),
                    points: point..point,
                    else_point: point,
                    sequences: [sequence, sequence],
                    polls: matches!(op, Operator::Loop { .. }) && polls.next().unwrap_or(true),
                });
            }
            Operator::Else => {
                if let Some(frame) = open.last_mut()
                    && let Some(construct) = frame.construct
                {
                    frame.sequence = out.sequences.len();
                    out.sequences.push(Vec::new());
                    out.constructs[construct].else_point = out.points.len() as u32;
                    out.constructs[construct].sequences[1] = frame.sequence;
                }
            }
            Operator::End => {
                if let Some(Open {
                    construct: Some(construct),
                    ..
                }) = open.pop()
                {
                    let construct = &mut out.constructs[construct];
                    construct.points.end = out.points.len() as u32;
                    if construct.sequences[0] == construct.sequences[1] {
                        construct.else_point = construct.points.end;
                    }
                    let landing = Landing {
                        points: construct.points.clone(),
                        is_simple_loop: construct.is_simple_loop(),
                    };
                    if !landing.points.is_empty()
                        && let Some(parent) = open.last()
                    {
                        out.sequences[parent.sequence].push(landing);
                    }
                }
            }
            _ => {}
        }
        validator.op(offset, &op)?;
        let ends_here = ends_here(&op);
        let point = match op {
            Operator::Loop { .. } if out.constructs.last().is_some_and(|loop_| loop_.polls) => {
                Some((PointKind::Loop, Vec::new()))
            }
            Operator::Call { function_index } if graph.may_unwind(function_index) => Some((
                PointKind::Call,
                graph.function_type(function_index).results().to_vec(),
            )),
            Operator::CallIndirect { type_index, .. } => {
                Some((PointKind::Call, graph.ty(type_index).results().to_vec()))
            }
            _ => None,
        };
        out.ops.push(op);
        if let Some((kind, results)) = point {
            out.point(kind, Some(position), validator, &open, &results);
        }
        if ends_here {
            dead_depth = Some(0);
        }
    }
    Ok(out)
}

impl Body<'_> {
    fn point(
        &mut self,
        kind: PointKind,
        op: Option<usize>,
        validator: &FuncValidator<ValidatorResources>,
        open: &[Open],
        results: &[ValType],
    ) {
        let (mut all, base) = operands(validator);
        all.truncate(all.len() - results.len());
        let number = self.points.len() as u32;
        self.points.push(Point {
            kind,
            op,
            operands: all,
            outer: base,
            results: results.to_vec(),
        });
        if let Some(frame) = open.last() {
            self.sequences[frame.sequence].push(Landing {
                points: number..number + 1,
                is_simple_loop: false,
            });
        }
    }
}

/// Whether each iteration of a loop calls a function that polls at its entry before any back edge,
/// so that its header need not poll. `reader` is positioned behind the loop's start.
fn polls_by_a_call(
    mut reader: OperatorsReader<'_>,
    graph: &CallGraph,
) -> Result<bool, InstrumentError> {
    for _ in 0..LOOKAHEAD_MAX {
        match reader.read()? {
            Operator::Call { function_index } if graph.polls_at_entry(function_index) => {
                return Ok(true);
            }
            Operator::Block { .. }
            | Operator::Loop { .. }
            | Operator::If { .. }
            | Operator::Else
            | Operator::End
            | Operator::Br { .. }
            | Operator::BrIf { .. }
            | Operator::BrTable { .. }
            | Operator::Return
            | Operator::Unreachable
            | Operator::ReturnCall { .. }
            | Operator::ReturnCallIndirect { .. } => return Ok(false),
            _ => {}
        }
    }
    Ok(false)
}

/// The loops that poll at their headers, in order of their starts: those without such a call in
/// each iteration, and those around a polling one, so that code resumed in the inner loop can
/// return to the outer one (see `emit`).
fn polling_loops(
    mut reader: OperatorsReader<'_>,
    graph: &CallGraph,
) -> Result<Vec<bool>, InstrumentError> {
    let (mut polls, mut open, mut loops) = (Vec::new(), Vec::new(), Vec::new());
    while !reader.eof() {
        match reader.read()? {
            Operator::Loop { .. } => {
                loops.push(polls.len());
                open.push(true);
                polls.push(!polls_by_a_call(reader.clone(), graph)?);
            }
            Operator::Block { .. } | Operator::If { .. } => open.push(false),
            Operator::End => {
                if open.pop() == Some(true)
                    && let Some(inner) = loops.pop()
                    && let Some(outer) = loops.last().copied()
                {
                    polls[outer] |= polls[inner];
                }
            }
            _ => {}
        }
    }
    Ok(polls)
}

/// All operand types from the bottom, and the height of the innermost frame's bottom.
fn operands(validator: &FuncValidator<ValidatorResources>) -> (Vec<ValType>, usize) {
    let height = validator.operand_stack_height() as usize;
    let types = (0..height)
        .rev()
        // Reachable code has no operand of unknown type.
        .filter_map(|depth| validator.get_operand_type(depth).flatten())
        .collect();
    let base = validator
        .get_control_frame(0)
        .map_or(0, |frame| frame.height);
    (types, base)
}

/// Parameters and results of a block type.
pub(crate) fn block_types(
    ty: BlockType,
    resources: &impl WasmModuleResources,
) -> (Vec<ValType>, Vec<ValType>) {
    match ty {
        BlockType::Empty => (Vec::new(), Vec::new()),
        BlockType::Type(ty) => (Vec::new(), vec![ty]),
        BlockType::FuncType(index) => match resources.sub_type_at(index) {
            Some(sub) => {
                let ty = sub.unwrap_func();
                (ty.params().to_vec(), ty.results().to_vec())
            }
            None => (Vec::new(), Vec::new()),
        },
    }
}
