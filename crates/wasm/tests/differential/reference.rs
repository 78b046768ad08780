//! The original module on unmodified wasmtime.

use crate::{Ended, Observed, trap_name};
use keel_wasm::runtime::STACK_BYTES;
use keel_wasm::runtime::frame::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use wasmparser::{ExternalKind, Operator, Parser, Payload};
use wasmtime::{Config, Engine, Extern, Func, Instance, Module, Ref, Store, Val, ValType};

pub(crate) struct Plain {
    store: Store<()>,
    instance: Instance,
    /// Names of exports by kind and index.
    names: BTreeMap<(u8, u32), String>,
    /// Index plus one of a function by its raw reference.
    indices: HashMap<usize, u32>,
}

const FUNCTION: u8 = 0;
const TABLE: u8 = 1;
const MEMORY: u8 = 2;
const GLOBAL: u8 = 3;

fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let mut config = Config::new();
        config
            .cranelift_nan_canonicalization(true)
            .relaxed_simd_deterministic(true)
            .wasm_threads(true)
            .shared_memory(true)
            .wasm_tail_call(true)
            .wasm_multi_memory(true)
            .wasm_memory64(true)
            .wasm_extended_const(true)
            .wasm_relaxed_simd(true)
            .max_wasm_stack(STACK_BYTES);
        Engine::new(&config).unwrap()
    })
}

impl Plain {
    /// # Errors
    /// The trap, if it cannot be instantiated.
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, String> {
        let module = Module::new(engine(), bytes).unwrap();
        let mut store = Store::new(engine(), ());
        let instance =
            Instance::new(&mut store, &module, &[]).map_err(|error| format!("{error:#}"))?;
        let mut names = BTreeMap::new();
        for payload in Parser::new(0).parse_all(bytes) {
            if let Payload::ExportSection(section) = payload.unwrap() {
                for export in section {
                    let export = export.unwrap();
                    let kind = match export.kind {
                        ExternalKind::Func => FUNCTION,
                        ExternalKind::Table => TABLE,
                        ExternalKind::Memory => MEMORY,
                        _ => GLOBAL,
                    };
                    names.insert((kind, export.index), export.name.to_owned());
                }
            }
        }
        let mut indices = HashMap::new();
        for ((kind, index), name) in &names {
            if *kind == FUNCTION {
                let function = instance.get_func(&mut store, name).unwrap();
                indices.insert(function.to_raw(&mut store) as usize, index + 1);
            }
        }
        Ok(Plain {
            store,
            instance,
            names,
            indices,
        })
    }

    fn exported(&self, kind: u8) -> Vec<(u32, String)> {
        self.names
            .range((kind, 0)..=(kind, u32::MAX))
            .map(|((_, index), name)| (*index, name.clone()))
            .collect()
    }

    /// Exported functions: name and types of parameters.
    pub(crate) fn functions(&mut self) -> Vec<(String, Vec<ValType>)> {
        self.exported(FUNCTION)
            .into_iter()
            .map(|(_, name)| {
                let function = self.instance.get_func(&mut self.store, &name).unwrap();
                let params = function.ty(&self.store).params().collect();
                (name, params)
            })
            .collect()
    }

    pub(crate) fn call(&mut self, name: &str, args: &[Value]) -> Ended {
        let function = self.instance.get_func(&mut self.store, name).unwrap();
        let params: Vec<Val> = args
            .iter()
            .map(|arg| match *arg {
                Value::I32(bits) => Val::I32(bits as i32),
                Value::I64(bits) => Val::I64(bits as i64),
                Value::F32(bits) => Val::F32(bits),
                Value::F64(bits) => Val::F64(bits),
                Value::V128(bits) => Val::V128(bits.into()),
                Value::FuncRef(_) => Val::FuncRef(None),
            })
            .collect();
        let mut results = vec![Val::I32(0); function.ty(&self.store).results().len()];
        match function.call(&mut self.store, &params, &mut results) {
            Ok(()) => Ended::Returned(results.iter().map(|val| self.value(val)).collect()),
            Err(error) => {
                let trap = error.downcast_ref::<wasmtime::Trap>();
                Ended::Trapped(trap_name(&trap.unwrap().to_string()))
            }
        }
    }

    fn value(&mut self, val: &Val) -> Value {
        match val {
            Val::I32(value) => Value::I32(*value as u32),
            Val::I64(value) => Value::I64(*value as u64),
            Val::F32(bits) => Value::F32(*bits),
            Val::F64(bits) => Value::F64(*bits),
            Val::V128(bits) => Value::V128(bits.as_u128()),
            Val::FuncRef(function) => Value::FuncRef(self.index_of(*function)),
            other => panic!("{other:?}"),
        }
    }

    fn index_of(&mut self, function: Option<Func>) -> u32 {
        function.map_or(0, |function| {
            self.indices[&(function.to_raw(&mut self.store) as usize)]
        })
    }

    /// Tables and mutable globals that are exported: all but the fuel.
    pub(crate) fn observe(&mut self) -> Observed {
        let mut observed = Observed::default();
        for (index, name) in self.exported(GLOBAL) {
            let global = self.instance.get_global(&mut self.store, &name).unwrap();
            if global.ty(&self.store).mutability() == wasmtime::Mutability::Var {
                let val = global.get(&mut self.store);
                let value = self.value(&val);
                observed.globals.push((index, value));
            }
        }
        for (_, name) in self.exported(MEMORY) {
            let export = self.instance.get_export(&mut self.store, &name);
            observed.memories.push(match export.unwrap() {
                Extern::Memory(memory) => (
                    memory.size(&self.store),
                    *blake3::hash(memory.data(&self.store)).as_bytes(),
                ),
                Extern::SharedMemory(memory) => {
                    // SAFETY: no thread of the guest runs.
                    let bytes = memory.data().iter().map(|cell| unsafe { *cell.get() });
                    let bytes: Vec<u8> = bytes.collect();
                    (memory.size(), *blake3::hash(&bytes).as_bytes())
                }
                _ => panic!("{name} is no memory"),
            });
        }
        for (index, name) in self.exported(TABLE) {
            let table = self.instance.get_table(&mut self.store, &name).unwrap();
            let mut entries = Vec::new();
            for entry in 0..table.size(&self.store) {
                let Some(Ref::Func(function)) = table.get(&mut self.store, entry) else {
                    panic!("an entry of another type");
                };
                entries.push(self.index_of(function));
            }
            observed.tables.push((index, entries));
        }
        observed
    }
}

/// Whether code waits: a single thread would wait forever.
pub(crate) fn waits(bytes: &[u8]) -> bool {
    Parser::new(0).parse_all(bytes).any(|payload| {
        let Ok(Payload::CodeSectionEntry(body)) = payload else {
            return false;
        };
        body.get_operators_reader().unwrap().into_iter().any(|op| {
            matches!(
                op,
                Ok(Operator::MemoryAtomicWait32 { .. } | Operator::MemoryAtomicWait64 { .. })
            )
        })
    })
}
