//! How clones reach what they call.
//!
//! Clones are compiled apart from the hot code, a module for each function ([`super::extract`]), so
//! whatever they call must be exported by the hot module. The engine compiles an entry trampoline
//! for each exported function, which for all functions takes a sixth of the time of the hot code.
//! So only functions that have a trampoline anyway (imports, and functions whose reference can be
//! taken) are exported themselves. The others are reached through *dispatchers*, one for each type
//! (or more, so that none is large: a function is compiled on one processor): functions with an
//! additional parameter, the position of the function to call.
//!
//! References and segments belong to the hot module's instance. A clone takes a reference from the
//! directory table, and a function of the hot module (a *segment operation*) reads or drops a
//! segment.

use super::callgraph::CallGraph;
use super::plan::BlockTypes;
use std::collections::HashMap;
use wasm_encoder::{BlockType, Function, Instruction};
use wasmparser::{Operator, ValType};

/// Limit of implementations on the parameters of a function; a dispatcher has one more than the
/// functions that it calls.
const PARAMS_MAX: usize = 1000;

/// The most functions of one dispatcher.
const DISPATCHED_MAX: usize = 256;

/// How a clone calls a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Callee {
    /// By itself; it is exported.
    Exported,
    /// Through the dispatcher with this function index, as its function at `position`.
    Dispatched { dispatcher: u32, position: u32 },
}

/// An operator that reads or drops a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum SegmentOp {
    TableInit { segment: u32, table: u32 },
    ElemDrop(u32),
    MemoryInit { segment: u32, memory: u32 },
    DataDrop(u32),
}

impl SegmentOp {
    pub(crate) fn of(op: &Operator<'_>) -> Option<Self> {
        Some(match *op {
            Operator::TableInit { elem_index, table } => SegmentOp::TableInit {
                segment: elem_index,
                table,
            },
            Operator::ElemDrop { elem_index } => SegmentOp::ElemDrop(elem_index),
            Operator::MemoryInit { data_index, mem } => SegmentOp::MemoryInit {
                segment: data_index,
                memory: mem,
            },
            Operator::DataDrop { data_index } => SegmentOp::DataDrop(data_index),
            _ => return None,
        })
    }
}

/// Functions of one type, reached through a function that takes their position.
struct Dispatcher {
    ty: u32,
    params: u32,
    functions: Vec<u32>,
}

/// The functions that the hot module has for its clones, behind its own.
pub(crate) struct Callees {
    dispatchers: Vec<Dispatcher>,
    segment_ops: Vec<(SegmentOp, u32)>,
    /// By function index.
    callees: Vec<Callee>,
    /// Functions whose reference can be taken, in the order of the directory table.
    directory: Vec<u32>,
    first: u32,
}

impl Callees {
    /// `referenced`: functions whose reference can be taken, in rising order. `address64`: whether
    /// the tables and the memories have 64-bit addresses. The types are added to `types`, whose
    /// module has twice as many function types as `graph` in front: the second time with a status.
    pub(crate) fn new(
        graph: &CallGraph,
        referenced: &[u32],
        segment_ops: &[SegmentOp],
        address64: (&[bool], &[bool]),
        types: &mut BlockTypes,
    ) -> Self {
        let first = graph.functions();
        let mut dispatchers: Vec<Dispatcher> = Vec::new();
        let mut known: HashMap<u32, u32> = HashMap::new();
        let mut callees = vec![Callee::Exported; graph.functions() as usize];
        for function in graph.imported()..graph.functions() {
            let ty = graph.function_type(function);
            if referenced.binary_search(&function).is_ok() || ty.params().len() >= PARAMS_MAX {
                continue;
            }
            let mut params = ty.params().to_vec();
            params.push(ValType::I32);
            let mut results = ty.results().to_vec();
            results.extend(graph.has_status(function).then_some(ValType::I32));
            let ty = types.function(&params, &results);
            let has_room =
                |number: &u32| dispatchers[*number as usize].functions.len() < DISPATCHED_MAX;
            let number = known.get(&ty).copied().filter(has_room).unwrap_or_else(|| {
                let number = dispatchers.len() as u32;
                dispatchers.push(Dispatcher {
                    ty,
                    params: params.len() as u32 - 1,
                    functions: Vec::new(),
                });
                number
            });
            known.insert(ty, number);
            let functions = &mut dispatchers[number as usize].functions;
            callees[function as usize] = Callee::Dispatched {
                dispatcher: first + number,
                position: functions.len() as u32,
            };
            functions.push(function);
        }
        let (tables, memories) = address64;
        let address = |is_64: Option<&bool>| match is_64 {
            Some(true) => ValType::I64,
            _ => ValType::I32,
        };
        let segment_ops = segment_ops.iter().map(|op| {
            let params = match op {
                SegmentOp::TableInit { table, .. } => {
                    vec![
                        address(tables.get(*table as usize)),
                        ValType::I32,
                        ValType::I32,
                    ]
                }
                SegmentOp::MemoryInit { memory, .. } => vec![
                    address(memories.get(*memory as usize)),
                    ValType::I32,
                    ValType::I32,
                ],
                SegmentOp::ElemDrop(_) | SegmentOp::DataDrop(_) => Vec::new(),
            };
            (*op, types.function(&params, &[]))
        });
        Callees {
            segment_ops: segment_ops.collect(),
            dispatchers,
            callees,
            directory: referenced.to_vec(),
            first,
        }
    }

    /// How a clone calls a function.
    pub(crate) fn callee(&self, function: u32) -> Callee {
        self.callees[function as usize]
    }

    /// Entry of the directory table for a function whose reference is taken.
    pub(crate) fn reference(&self, function: u32) -> Option<u32> {
        let position = self.directory.binary_search(&function).ok()?;
        Some(position as u32)
    }

    /// Index of the function that performs an operation on a segment.
    pub(crate) fn segment_op(&self, op: SegmentOp) -> Option<u32> {
        let position = self.segment_ops.iter().position(|(it, _)| *it == op)?;
        Some(self.first + (self.dispatchers.len() + position) as u32)
    }

    /// Index behind the last of these functions.
    pub(crate) fn end(&self) -> u32 {
        self.first + (self.dispatchers.len() + self.segment_ops.len()) as u32
    }

    /// Indices of all functions that clones may call.
    pub(crate) fn exported(&self) -> impl Iterator<Item = u32> {
        let callees = (0u32..).zip(&self.callees);
        let exported = callees.filter(|(_, callee)| **callee == Callee::Exported);
        exported
            .map(|(function, _)| function)
            .chain(self.first..self.end())
    }

    /// These functions in the order of their indices: their types and bodies.
    pub(crate) fn functions(&self) -> impl Iterator<Item = (u32, Function)> {
        let dispatchers = self.dispatchers.iter().map(|it| (it.ty, it.body()));
        let segment_ops = self.segment_ops.iter().map(|(op, ty)| (*ty, op.body()));
        dispatchers.chain(segment_ops)
    }
}

impl Dispatcher {
    fn body(&self) -> Function {
        let count = self.functions.len() as u32;
        let mut out = Function::new([]);
        for _ in 0..=count {
            out.instruction(&Instruction::Block(BlockType::Empty));
        }
        let targets: Vec<u32> = (0..count).collect();
        out.instruction(&Instruction::LocalGet(self.params))
            .instruction(&Instruction::BrTable(targets.into(), count))
            .instruction(&Instruction::End);
        for function in &self.functions {
            for param in 0..self.params {
                out.instruction(&Instruction::LocalGet(param));
            }
            out.instruction(&Instruction::Call(*function))
                .instruction(&Instruction::Return)
                .instruction(&Instruction::End);
        }
        out.instruction(&Instruction::Unreachable)
            .instruction(&Instruction::End);
        out
    }
}

impl SegmentOp {
    fn body(self) -> Function {
        let mut out = Function::new([]);
        if let SegmentOp::TableInit { .. } | SegmentOp::MemoryInit { .. } = self {
            for param in 0..3 {
                out.instruction(&Instruction::LocalGet(param));
            }
        }
        out.instruction(&match self {
            SegmentOp::TableInit { segment, table } => Instruction::TableInit {
                elem_index: segment,
                table,
            },
            SegmentOp::ElemDrop(segment) => Instruction::ElemDrop(segment),
            SegmentOp::MemoryInit { segment, memory } => Instruction::MemoryInit {
                data_index: segment,
                mem: memory,
            },
            SegmentOp::DataDrop(segment) => Instruction::DataDrop(segment),
        });
        out.instruction(&Instruction::End);
        out
    }
}
