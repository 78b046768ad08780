//! Decisions about a function before any version is written: the values that every point saves, the
//! frame layout, and the temporaries of operands.

use super::body::{Body, PointKind};
use super::callees::Callees;
use super::callgraph::CallGraph;
use super::error::InstrumentError;
use super::liveness::{self, LocalSet};
use super::meta::{self, slot_type};
use std::collections::HashMap;
use wasm_encoder::BlockType;
use wasm_encoder::reencode::{Reencode, RoundtripReencoder};
use wasmparser::ValType;

/// Block types that instrumented code needs in addition to the module's types.
#[derive(Default)]
pub(crate) struct BlockTypes {
    first: u32,
    known: HashMap<(Vec<ValType>, Vec<ValType>), u32>,
    pub(crate) list: Vec<(Vec<ValType>, Vec<ValType>)>,
}

impl BlockTypes {
    /// `first`: index of the first new type.
    pub(crate) fn new(first: u32) -> Self {
        BlockTypes {
            first,
            ..Self::default()
        }
    }

    pub(crate) fn function(&mut self, params: &[ValType], results: &[ValType]) -> u32 {
        let key = (params.to_vec(), results.to_vec());
        *self.known.entry(key).or_insert_with_key(|key| {
            self.list.push(key.clone());
            self.first + self.list.len() as u32 - 1
        })
    }

    pub(crate) fn block(
        &mut self,
        params: &[ValType],
        results: &[ValType],
    ) -> Result<BlockType, InstrumentError> {
        Ok(match (params, results) {
            ([], []) => BlockType::Empty,
            ([], [one]) => BlockType::Result(RoundtripReencoder.val_type(*one)?),
            _ => BlockType::FunctionType(self.function(params, results)),
        })
    }
}

/// Maximum locals of a function (an implementation limit).
const LOCALS_MAX: usize = 50_000;

/// State shared by all versions of a function.
pub(crate) struct Plan<'a> {
    pub(crate) body: &'a Body<'a>,
    pub(crate) graph: &'a CallGraph,
    pub(crate) callees: &'a Callees,
    pub(crate) function: u32,
    /// Index of the control memory and of the references table.
    pub(crate) control: u32,
    pub(crate) refs: u32,
    /// Index of type T with a status: `status_types + T`.
    pub(crate) status_types: u32,
    pub(crate) first_point: u32,
    pub(crate) temps: HashMap<(usize, ValType), u32>,
    pub(crate) temp_types: Vec<ValType>,
    /// Locals (temporaries included) by slot, with their types.
    pub(crate) slots: Vec<(u32, ValType)>,
    /// Byte offset of each slot in the restore area.
    pub(crate) slot_offsets: Vec<u32>,
    pub(crate) saved: Vec<Vec<u32>>,
    /// One point for each distinct list of [`Self::saved`], by which its exit is written.
    pub(crate) exits: Vec<usize>,
    /// Position in [`Self::exits`] of each point.
    pub(crate) exit_of: Vec<u32>,
}

pub(crate) struct PlanContext<'a> {
    pub(crate) graph: &'a CallGraph,
    pub(crate) callees: &'a Callees,
    pub(crate) control: u32,
    pub(crate) refs: u32,
    pub(crate) status_types: u32,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(
        body: &'a Body<'a>,
        context: &PlanContext<'a>,
        function: u32,
        first_point: u32,
        place: &str,
    ) -> Result<Self, InstrumentError> {
        let mut plan = Plan {
            body,
            graph: context.graph,
            callees: context.callees,
            function,
            control: context.control,
            refs: context.refs,
            status_types: context.status_types,
            first_point,
            temps: HashMap::new(),
            temp_types: Vec::new(),
            slots: Vec::new(),
            slot_offsets: Vec::new(),
            saved: Vec::new(),
            exits: Vec::new(),
            exit_of: Vec::new(),
        };
        if body.points.is_empty() {
            return Ok(plan);
        }
        plan.make_temps();
        let positions: Vec<Option<usize>> = body.points.iter().map(|point| point.op).collect();
        let live = liveness::live_at(&body.ops, body.locals.len(), &positions);
        plan.make_slots(&live);
        plan.make_exits();
        let mut offset = 0;
        for (_, ty) in &plan.slots {
            plan.slot_offsets.push(offset);
            offset += slot_type(*ty)?.bytes();
        }
        // (Plus the clone's parameter, and three of the writer.)
        let locals = body.locals.len() + plan.temp_types.len() + 4;
        if meta::RESTORE + offset > meta::SAVE || locals > LOCALS_MAX {
            return Err(InstrumentError::Unsupported {
                what: format!(
                    "{} locals, and {} operands of which a safepoint may find some",
                    body.locals.len(),
                    plan.temp_types.len()
                ),
                place: place.to_owned(),
            });
        }
        Ok(plan)
    }

    fn make_temps(&mut self) {
        let mut wanted = Vec::new();
        for point in &self.body.points {
            let all = point.operands.iter().chain(&point.results);
            wanted.extend(all.enumerate().map(|(height, ty)| (height, *ty)));
        }
        for construct in &self.body.constructs {
            if !construct.points.is_empty() {
                let all = construct.operands.iter().chain(&[ValType::I32]);
                wanted.extend(
                    all.enumerate()
                        .map(|(height, ty)| (construct.base + height, *ty)),
                );
            }
        }
        wanted.extend(self.body.results.iter().map(|ty| (RESULT, *ty)));
        for key in wanted {
            let next = (self.body.locals.len() + self.temp_types.len()) as u32;
            self.temps.entry(key).or_insert_with(|| {
                self.temp_types.push(key.1);
                next
            });
        }
    }

    fn make_slots(&mut self, live: &[LocalSet]) {
        let mut slot_of: HashMap<u32, u32> = HashMap::new();
        for (point, live) in self.body.points.iter().zip(live) {
            let locals = live
                .iter()
                // Other locals are zero at the entry.
                .filter(|local| {
                    point.kind != PointKind::Entry || (*local as usize) < self.body.params
                })
                .map(|local| (local, self.body.locals[local as usize]));
            let operands = point
                .operands
                .iter()
                .enumerate()
                .map(|(height, ty)| (self.temps[&(height, *ty)], *ty));
            let mut saved = Vec::new();
            for (local, ty) in locals.chain(operands) {
                let slot = *slot_of.entry(local).or_insert_with(|| {
                    self.slots.push((local, ty));
                    self.slots.len() as u32 - 1
                });
                saved.push(slot);
            }
            self.saved.push(saved);
            for (at, ty) in point.results.iter().enumerate() {
                let local = self.temps[&(point.operands.len() + at, *ty)];
                slot_of.entry(local).or_insert_with(|| {
                    self.slots.push((local, *ty));
                    self.slots.len() as u32 - 1
                });
            }
        }
    }

    fn make_exits(&mut self) {
        let mut known: HashMap<&[u32], u32> = HashMap::new();
        for (point, saved) in self.saved.iter().enumerate() {
            let exits = &mut self.exits;
            let exit = *known.entry(saved).or_insert_with(|| {
                exits.push(point);
                exits.len() as u32 - 1
            });
            self.exit_of.push(exit);
        }
    }

    /// The metadata of this function, whose clone has this index; `None` where it cannot be
    /// captured.
    pub(crate) fn meta(&self, clone: u32) -> Result<Option<meta::Function>, InstrumentError> {
        if self.body.points.is_empty() {
            return Ok(None);
        }
        let slot_of: HashMap<u32, u32> = self
            .slots
            .iter()
            .enumerate()
            .map(|(slot, (local, _))| (*local, slot as u32))
            .collect();
        let points = self
            .body
            .points
            .iter()
            .zip(&self.saved)
            .map(|(point, saved)| meta::Point {
                saved: saved.clone(),
                results: point
                    .results
                    .iter()
                    .enumerate()
                    .map(|(at, ty)| slot_of[&self.temps[&(point.operands.len() + at, *ty)]])
                    .collect(),
            })
            .collect();
        Ok(Some(meta::Function {
            index: self.function,
            clone,
            loop_versions: 0,
            first_point: self.first_point,
            slots: self
                .slots
                .iter()
                .map(|(_, ty)| slot_type(*ty))
                .collect::<Result<_, _>>()?,
            results: self
                .body
                .results
                .iter()
                .map(|ty| slot_type(*ty))
                .collect::<Result<_, _>>()?,
            points,
        }))
    }
}

/// Pseudo height of the temporaries for a clone's results.
pub(crate) const RESULT: usize = usize::MAX;
