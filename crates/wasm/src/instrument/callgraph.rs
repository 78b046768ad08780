//! The call graph: functions that may have a frame under a safepoint, that carry a status, and that
//! poll at their entry.
//!
//! Indirect calls reach every function of their type whose reference can be
//! taken. Entries that poll are chosen so that every cycle of calls passes one
//! (the targets of a depth-first search's back edges are such a set), and so
//! that no tree of calls without loops runs for longer than [`COST_MAX`]
//! operators between two polls.

use wasmparser::{FuncType, Operator};

/// Maximum operators that a loop-free call tree executes without a poll (about 30 µs).
pub(crate) const COST_MAX: u64 = 100_000;

/// Calls of one function.
#[derive(Debug, Default, Clone)]
pub(crate) struct Calls {
    pub(crate) direct: Vec<u32>,
    /// Canonical numbers of the types of its indirect calls.
    pub(crate) indirect: Vec<u32>,
    pub(crate) has_loop: bool,
    pub(crate) operators: u64,
}

#[derive(Debug)]
pub(crate) struct CallGraph {
    types: Vec<FuncType>,
    /// Type index of each function.
    functions: Vec<u32>,
    imported: u32,
    unwinds: Vec<bool>,
    status: Vec<bool>,
    entry_polls: Vec<bool>,
}

impl CallGraph {
    /// `referenced`: functions whose reference can be taken or that are
    /// exported. `calls`: one entry per defined function.
    pub(crate) fn new(
        types: Vec<FuncType>,
        functions: Vec<u32>,
        imported: u32,
        referenced: &[u32],
        mut calls: Vec<Calls>,
    ) -> Self {
        let canonical = canonical_types(&types);
        for ty in calls.iter_mut().flat_map(|calls| &mut calls.indirect) {
            *ty = canonical[*ty as usize];
        }
        let calls = &calls;
        let count = functions.len();
        let mut referenced_set = vec![false; count];
        for function in referenced {
            referenced_set[*function as usize] = true;
        }
        let mut by_type = vec![Vec::new(); types.len()];
        for (function, ty) in functions.iter().enumerate() {
            if referenced_set[function] {
                by_type[canonical[*ty as usize] as usize].push(function as u32);
            }
        }
        // Nodes: functions, then types; an indirect call goes through its type.
        let nodes = count + types.len();
        let mut edges: Vec<Vec<u32>> = vec![Vec::new(); nodes];
        for (defined, calls) in calls.iter().enumerate() {
            let node = imported as usize + defined;
            edges[node].extend(&calls.direct);
            edges[node].extend(calls.indirect.iter().map(|ty| count as u32 + ty));
            edges[node].sort_unstable();
            edges[node].dedup();
        }
        for (ty, functions) in by_type.into_iter().enumerate() {
            edges[count + ty] = functions;
        }
        let roots: Vec<u32> = referenced.to_vec();
        let (mut entry_polls, postorder) = cut_cycles(&edges, count, imported, &roots);
        cut_costs(&edges, count, imported, calls, &postorder, &mut entry_polls);
        let unwinds = may_unwind(&edges, count, imported, calls, &entry_polls);
        let status = (0..count)
            .map(|function| unwinds[function] || referenced_set[function])
            .collect();
        CallGraph {
            types,
            functions,
            imported,
            unwinds,
            status,
            entry_polls,
        }
    }

    pub(crate) fn ty(&self, index: u32) -> &FuncType {
        &self.types[index as usize]
    }

    pub(crate) fn types(&self) -> &[FuncType] {
        &self.types
    }

    pub(crate) fn type_index(&self, function: u32) -> u32 {
        self.functions[function as usize]
    }

    pub(crate) fn function_type(&self, function: u32) -> &FuncType {
        self.ty(self.functions[function as usize])
    }

    pub(crate) fn imported(&self) -> u32 {
        self.imported
    }

    pub(crate) fn functions(&self) -> u32 {
        self.functions.len() as u32
    }

    /// Whether a frame of the function may be under a safepoint.
    pub(crate) fn may_unwind(&self, function: u32) -> bool {
        self.unwinds[function as usize]
    }

    /// Whether the function returns a status besides its results.
    pub(crate) fn has_status(&self, function: u32) -> bool {
        self.status[function as usize]
    }

    pub(crate) fn polls_at_entry(&self, function: u32) -> bool {
        self.entry_polls[function as usize]
    }
}

/// Structurally equal types get one number, as indirect calls compare them by structure.
fn canonical_types(types: &[FuncType]) -> Vec<u32> {
    let mut seen = std::collections::HashMap::new();
    types
        .iter()
        .enumerate()
        .map(|(index, ty)| *seen.entry(ty).or_insert(index as u32))
        .collect()
}

/// A set of functions that cuts every cycle, and all nodes in postorder. A back edge is cut at its
/// target if that is a function, else at its source (a type's source is a function).
fn cut_cycles(
    edges: &[Vec<u32>],
    functions: usize,
    imported: u32,
    roots: &[u32],
) -> (Vec<bool>, Vec<u32>) {
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        New,
        Open,
        Done,
    }
    let mut marks = vec![Mark::New; edges.len()];
    let mut polls = vec![false; functions];
    let mut postorder = Vec::with_capacity(edges.len());
    let mut stack: Vec<(u32, usize)> = Vec::new();
    for root in roots.iter().copied().chain(0..edges.len() as u32) {
        if marks[root as usize] != Mark::New {
            continue;
        }
        marks[root as usize] = Mark::Open;
        stack.push((root, 0));
        while let Some((node, next)) = stack.last_mut() {
            let node = *node as usize;
            let Some(&callee) = edges[node].get(*next) else {
                marks[node] = Mark::Done;
                postorder.push(node as u32);
                stack.pop();
                continue;
            };
            *next += 1;
            match marks[callee as usize] {
                Mark::Done => {}
                Mark::New => {
                    marks[callee as usize] = Mark::Open;
                    stack.push((callee, 0));
                }
                Mark::Open => {
                    let cut = if (callee as usize) < functions {
                        callee as usize
                    } else {
                        node
                    };
                    if cut >= imported as usize {
                        polls[cut] = true;
                    }
                }
            }
        }
    }
    (polls, postorder)
}

/// Adds entry polls where a call tree would run for too long. The cost of a callee that polls does
/// not count: its poll comes first.
fn cut_costs(
    edges: &[Vec<u32>],
    functions: usize,
    imported: u32,
    calls: &[Calls],
    postorder: &[u32],
    polls: &mut [bool],
) {
    let mut cost = vec![0u64; edges.len()];
    for node in postorder.iter().map(|node| *node as usize) {
        if node >= functions {
            // One of them is called: the maximum counts.
            cost[node] = edges[node]
                .iter()
                .filter(|callee| !polls[**callee as usize])
                .map(|callee| cost[*callee as usize])
                .max()
                .unwrap_or(0);
            continue;
        }
        if node < imported as usize {
            continue;
        }
        let own = &calls[node - imported as usize];
        let total = |polls: &[bool], cost: &[u64]| {
            let direct = own
                .direct
                .iter()
                .filter(|callee| !polls[**callee as usize])
                .map(|callee| cost[*callee as usize]);
            let indirect = own.indirect.iter().map(|ty| cost[functions + *ty as usize]);
            direct
                .chain(indirect)
                .fold(own.operators, u64::saturating_add)
        };
        cost[node] = total(polls, &cost);
        if cost[node] > COST_MAX {
            for callee in &own.direct {
                let callee = *callee as usize;
                if callee >= imported as usize && cost[callee] > COST_MAX / 100 {
                    polls[callee] = true;
                }
            }
            cost[node] = total(polls, &cost).min(COST_MAX);
        }
    }
}

/// Functions that poll, call the host, call through a table, or call such a
/// function.
fn may_unwind(
    edges: &[Vec<u32>],
    functions: usize,
    imported: u32,
    calls: &[Calls],
    polls: &[bool],
) -> Vec<bool> {
    let mut callers = vec![Vec::new(); functions];
    let mut unwinds = vec![false; functions];
    let mut work: Vec<u32> = Vec::new();
    for function in 0..functions {
        for callee in &edges[function] {
            if (*callee as usize) < functions {
                callers[*callee as usize].push(function as u32);
            }
        }
        let own = (function as u32)
            .checked_sub(imported)
            .map(|defined| &calls[defined as usize]);
        unwinds[function] = match own {
            None => true,
            Some(calls) => polls[function] || calls.has_loop || !calls.indirect.is_empty(),
        };
        if unwinds[function] {
            work.push(function as u32);
        }
    }
    while let Some(function) = work.pop() {
        for caller in &callers[function as usize] {
            if !std::mem::replace(&mut unwinds[*caller as usize], true) {
                work.push(*caller);
            }
        }
    }
    unwinds
}

/// Records the calls of an operator.
pub(crate) fn note(calls: &mut Calls, op: &Operator<'_>) {
    calls.operators += 1;
    match op {
        Operator::Call { function_index } | Operator::ReturnCall { function_index } => {
            calls.direct.push(*function_index);
        }
        Operator::CallIndirect { type_index, .. }
        | Operator::ReturnCallIndirect { type_index, .. } => calls.indirect.push(*type_index),
        Operator::Loop { .. } => calls.has_loop = true,
        _ => {}
    }
}
