//! Live locals at each point (classic backward liveness analysis, see Aho, Lam, Sethi, Ullman,
//! "Compilers", section 9.2.5).
//!
//! WebAssembly's control flow is structured, so no graph is built: the code is traversed backwards
//! with a stack of open constructs, repeatedly until no loop header's set grows. That takes one
//! pass per nesting level of loops, plus one.

use wasmparser::Operator;

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct LocalSet(Vec<u64>);

impl LocalSet {
    fn new(locals: usize) -> Self {
        LocalSet(vec![0; locals.div_ceil(64)])
    }

    fn insert(&mut self, local: u32) {
        self.0[local as usize / 64] |= 1 << (local % 64);
    }

    fn remove(&mut self, local: u32) {
        self.0[local as usize / 64] &= !(1 << (local % 64));
    }

    fn clear(&mut self) {
        self.0.fill(0);
    }

    /// Adds all of `other`; returns whether the set grew.
    fn union(&mut self, other: &LocalSet) -> bool {
        let mut grew = false;
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            grew |= *theirs & !*mine != 0;
            *mine |= *theirs;
        }
        grew
    }

    /// The members, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().enumerate().flat_map(|(word, bits)| {
            let mut rest = *bits;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    word as u32 * 64 + bit
                })
            })
        })
    }
}

struct Open {
    /// Live at the target of a branch to this construct's label.
    label: LocalSet,
    /// Live behind the construct's end.
    end: LocalSet,
    /// Live at the start of the else arm, once that was visited.
    otherwise: Option<LocalSet>,
    /// Number among the loops, for loops.
    loop_number: Option<usize>,
}

/// Computes the live locals at each of `points`: positions `op` such that the
/// set holds just *after* that operator (`None`: at the function's start).
/// `points` rise. `ops` ends with the function's own `end` and has no
/// unreachable code.
pub(crate) fn live_at(
    ops: &[Operator<'_>],
    locals: usize,
    points: &[Option<usize>],
) -> Vec<LocalSet> {
    let loop_of_end = loops_by_end(ops);
    let mut headers: Vec<LocalSet> = ops
        .iter()
        .filter(|op| matches!(op, Operator::Loop { .. }))
        .map(|_| LocalSet::new(locals))
        .collect();
    let mut found = vec![LocalSet::new(locals); points.len()];
    loop {
        let mut grew = false;
        let mut live = LocalSet::new(locals);
        let mut open: Vec<Open> = Vec::new();
        let mut next_point = points.len();
        for (position, op) in ops.iter().enumerate().rev() {
            while next_point > 0 && points[next_point - 1] == Some(position) {
                next_point -= 1;
                found[next_point].0.copy_from_slice(&live.0);
            }
            match op {
                Operator::End => {
                    let loop_number = loop_of_end[position];
                    let label = match loop_number {
                        Some(number) => headers[number].clone(),
                        None => live.clone(),
                    };
                    open.push(Open {
                        label,
                        end: live.clone(),
                        otherwise: None,
                        loop_number,
                    });
                }
                Operator::Else => {
                    if let Some(frame) = open.last_mut() {
                        frame.otherwise = Some(std::mem::replace(&mut live, frame.end.clone()));
                    }
                }
                Operator::If { .. } => {
                    if let Some(frame) = open.pop() {
                        live.union(frame.otherwise.as_ref().unwrap_or(&frame.end));
                    }
                }
                Operator::Loop { .. } => {
                    if let Some(number) = open.pop().and_then(|frame| frame.loop_number) {
                        grew |= headers[number].union(&live);
                    }
                }
                Operator::Block { .. } => {
                    open.pop();
                }
                Operator::Br { relative_depth } => {
                    live = label(&open, *relative_depth).clone();
                }
                Operator::BrIf { relative_depth } => {
                    live.union(label(&open, *relative_depth));
                }
                Operator::BrTable { targets } => {
                    live = label(&open, targets.default()).clone();
                    for target in targets.targets().flatten() {
                        live.union(label(&open, target));
                    }
                }
                Operator::Return
                | Operator::Unreachable
                | Operator::ReturnCall { .. }
                | Operator::ReturnCallIndirect { .. } => live.clear(),
                Operator::LocalGet { local_index } => live.insert(*local_index),
                Operator::LocalSet { local_index } | Operator::LocalTee { local_index } => {
                    live.remove(*local_index);
                }
                _ => {}
            }
        }
        while next_point > 0 {
            next_point -= 1;
            found[next_point].0.copy_from_slice(&live.0);
        }
        if !grew {
            return found;
        }
    }
}

fn label(open: &[Open], depth: u32) -> &LocalSet {
    // The module is valid: a branch never leaves its function.
    &open[open.len() - 1 - depth as usize].label
}

/// For each `end` that closes a loop, that loop's number in order of starts.
fn loops_by_end(ops: &[Operator<'_>]) -> Vec<Option<usize>> {
    let mut by_end = vec![None; ops.len()];
    let mut open = Vec::new();
    let mut loops = 0;
    for (position, op) in ops.iter().enumerate() {
        match op {
            Operator::Block { .. } | Operator::If { .. } => open.push(None),
            Operator::Loop { .. } => {
                open.push(Some(loops));
                loops += 1;
            }
            Operator::End => by_end[position] = open.pop().flatten(),
            _ => {}
        }
    }
    by_end
}
