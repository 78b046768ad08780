//! The instrumented module without its clones, in which programs start.
//!
//! Clones are half of an instrumented module, and most programs never move. All indices, types,
//! memories and tables are those of the whole module, so a thread captured in an instance of this
//! one resumes in an instance of the whole.

use super::error::InstrumentError;
use super::meta::{self, Meta};
use wasm_encoder::reencode::{Reencode, RoundtripReencoder, utils};
use wasm_encoder::{
    BranchHint, BranchHints, CodeSection, ExportSection, FunctionSection, Module, RawSection,
};
use wasmparser::{CustomSectionReader, KnownCustom, Parser, Payload};

/// Removes the clones, the functions that enter them, and the metadata.
///
/// # Errors
/// [`InstrumentError`] if the module is not instrumented.
pub fn without_clones(module: &[u8], meta: &Meta) -> Result<Vec<u8>, InstrumentError> {
    let mut out = Module::new();
    let imported = meta.imports.len() as u32;
    let mut kept = 0;
    let mut code = CodeSection::new();
    let mut left = 0;
    for payload in Parser::new(0).parse_all(module) {
        let payload = payload?;
        match &payload {
            Payload::FunctionSection(section) => {
                let types: Vec<u32> = section.clone().into_iter().collect::<Result<_, _>>()?;
                kept = without(&types, meta.functions.len())?;
                let mut functions = FunctionSection::new();
                for ty in section.clone().into_iter().take(kept as usize) {
                    functions.function(ty?);
                }
                out.section(&functions);
            }
            Payload::ExportSection(section) => {
                let mut exports = ExportSection::new();
                for export in section.clone() {
                    let export = export?;
                    if export.name != meta::RESUME_EXPORT {
                        utils::parse_export(&mut RoundtripReencoder, &mut exports, export)?;
                    }
                }
                out.section(&exports);
            }
            Payload::CodeSectionStart { .. } => left = kept,
            Payload::CodeSectionEntry(body) => {
                if left > 0 {
                    code.raw(bytes(module, body.range())?);
                    left -= 1;
                    if left == 0 {
                        out.section(&code);
                    }
                }
            }
            Payload::CustomSection(section) => custom(&mut out, section, imported + kept)?,
            other => {
                if let Some((id, range)) = other.as_section() {
                    let data = bytes(module, range)?;
                    out.section(&RawSection { id, data });
                }
            }
        }
    }
    Ok(out.finish())
}

/// Number of remaining functions. The dispatcher comes last; the clones precede it, and no
/// remaining function has their type.
fn without(types: &[u32], clones: usize) -> Result<u32, InstrumentError> {
    let few = || InstrumentError::Malformed("it has fewer functions than clones".into());
    let (_, types) = types.split_last().ok_or_else(few)?;
    let kept = match (clones, types.last()) {
        (0, _) => types.len(),
        (_, None) => return Err(few()),
        (_, Some(clone)) => types
            .iter()
            .rposition(|ty| ty != clone)
            .map_or(0, |at| at + 1),
    };
    match kept + clones <= types.len() {
        true => Ok(kept as u32),
        false => Err(few()),
    }
}

/// Branch hints of the remaining functions, and names.
fn custom(
    out: &mut Module,
    section: &CustomSectionReader<'_>,
    functions: u32,
) -> Result<(), InstrumentError> {
    match section.as_known() {
        KnownCustom::BranchHints(reader) => {
            let mut hints = BranchHints::new();
            for function in reader {
                let function = function?;
                if function.func < functions {
                    let list = function
                        .hints
                        .into_iter()
                        .map(|hint| {
                            hint.map(|hint| BranchHint {
                                branch_func_offset: hint.func_offset,
                                branch_hint_value: u32::from(hint.taken),
                            })
                        })
                        .collect::<Result<Vec<_>, _>>()?;
                    hints.function_hints(function.func, list);
                }
            }
            out.section(&hints);
        }
        KnownCustom::Name(_) => {
            out.section(&RoundtripReencoder.custom_section(section.clone())?);
        }
        _ => {}
    }
    Ok(())
}

fn bytes(module: &[u8], range: std::ops::Range<u64>) -> Result<&[u8], InstrumentError> {
    module
        .get(range.start as usize..range.end as usize)
        .ok_or_else(|| InstrumentError::Malformed("a section is cut off".into()))
}
