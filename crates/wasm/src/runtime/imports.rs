//! Validation of a module's imports before anything else: instrumenting and compiling a large
//! module takes many seconds, reading its first sections microseconds.

use super::host::guest_kind;
use super::program::ProgramError;
use crate::instrument::meta::{Import, slot_type};
use wasmparser::{FuncType, Parser, Payload, TypeRef};

/// Checks the imports of an original module. `has` tells of a non-function import whether it is
/// available, or is checked elsewhere. A module that is malformed before the end of its imports is
/// also refused elsewhere.
///
/// # Errors
/// [`ProgramError::UnknownImports`] with all unknown imports.
pub(super) fn check(module: &[u8], has: impl Fn(TypeRef) -> bool) -> Result<(), ProgramError> {
    let mut types: Vec<Option<FuncType>> = Vec::new();
    let mut unknown = Vec::new();
    for payload in Parser::new(0).parse_all(module) {
        match payload {
            Ok(Payload::TypeSection(section)) => {
                types = section
                    .into_iter_err_on_gc_types()
                    .map(Result::ok)
                    .collect();
            }
            Ok(Payload::ImportSection(section)) => {
                for import in section.into_imports().map_while(Result::ok) {
                    let is_resident = match import.ty {
                        TypeRef::Func(ty) => types
                            .get(ty as usize)
                            .and_then(Option::as_ref)
                            .and_then(|ty| import_of(import.module, import.name, ty))
                            .is_some_and(|import| guest_kind(&import).is_some()),
                        other => has(other),
                    };
                    if !is_resident {
                        unknown.push(format!("{}.{}", import.module, import.name));
                    }
                }
                break;
            }
            Ok(Payload::CodeSectionStart { .. }) | Err(_) => break,
            Ok(_) => {}
        }
    }
    match unknown.is_empty() {
        true => Ok(()),
        false => Err(ProgramError::UnknownImports(unknown.join(", "))),
    }
}

fn import_of(module: &str, name: &str, ty: &FuncType) -> Option<Import> {
    let slots = |types: &[wasmparser::ValType]| {
        let slots = types.iter().map(|ty| slot_type(*ty));
        slots.collect::<Result<Vec<_>, _>>().ok()
    };
    Some(Import {
        module: module.into(),
        name: name.into(),
        params: slots(ty.params())?,
        results: slots(ty.results())?,
    })
}
