//! Makes a module that Asyncify can leave wherever ours can: each loop header and function entry
//! tests a global, and calls the host if it is set. Asyncify by itself only rewrites functions
//! that may reach a host call.

use anyhow::{Result, anyhow};
use wasm_encoder::reencode::{Error, Reencode, utils};
use wasm_encoder::{
    BlockType, CodeSection, ConstExpr, EntityType, ExportKind, ExportSection, Function,
    GlobalSection, GlobalType, ImportSection, Instruction as I, Module, TypeSection, ValType,
};

/// The host call of a poll, which all our runners provide.
const HOST: (&str, &str) = ("wasi_snapshot_preview1", "sched_yield");

#[derive(Default)]
struct Polls {
    types: u32,
    imported: u32,
    globals: u32,
}

/// Adds the polls.
pub(crate) fn with_polls(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut polls = Polls::default();
    for payload in wasmparser::Parser::new(0).parse_all(bytes) {
        match payload? {
            wasmparser::Payload::TypeSection(section) => polls.types = section.count(),
            wasmparser::Payload::ImportSection(section) => polls.imported = section.count(),
            wasmparser::Payload::GlobalSection(section) => polls.globals = section.count(),
            _ => {}
        }
    }
    let mut module = Module::new();
    polls
        .parse_core_module(&mut module, wasmparser::Parser::new(0), bytes)
        .map_err(|error| anyhow!("{error}"))?;
    Ok(module.finish())
}

impl Polls {
    fn poll(&self, out: &mut Function) {
        out.instruction(&I::GlobalGet(self.globals))
            .instruction(&I::If(BlockType::Empty))
            .instruction(&I::Call(self.imported))
            .instruction(&I::Drop)
            .instruction(&I::End);
    }
}

impl Reencode for Polls {
    type Error = std::convert::Infallible;

    fn function_index(&mut self, index: u32) -> Result<u32, Error> {
        Ok(index + u32::from(index >= self.imported))
    }

    fn parse_type_section(
        &mut self,
        types: &mut TypeSection,
        section: wasmparser::TypeSectionReader<'_>,
    ) -> Result<(), Error> {
        utils::parse_type_section(self, types, section)?;
        types.ty().function([], [ValType::I32]);
        Ok(())
    }

    fn parse_import_section(
        &mut self,
        imports: &mut ImportSection,
        section: wasmparser::ImportSectionReader<'_>,
    ) -> Result<(), Error> {
        utils::parse_import_section(self, imports, section)?;
        imports.import(HOST.0, HOST.1, EntityType::Function(self.types));
        Ok(())
    }

    fn parse_global_section(
        &mut self,
        globals: &mut GlobalSection,
        section: wasmparser::GlobalSectionReader<'_>,
    ) -> Result<(), Error> {
        utils::parse_global_section(self, globals, section)?;
        let ty = GlobalType {
            val_type: ValType::I32,
            mutable: true,
            shared: false,
        };
        globals.global(ty, &ConstExpr::i32_const(0));
        Ok(())
    }

    fn parse_export_section(
        &mut self,
        exports: &mut ExportSection,
        section: wasmparser::ExportSectionReader<'_>,
    ) -> Result<(), Error> {
        utils::parse_export_section(self, exports, section)?;
        // Exported, so that no optimiser takes it for constant zero.
        exports.export("request", ExportKind::Global, self.globals);
        Ok(())
    }

    fn parse_function_body(
        &mut self,
        code: &mut CodeSection,
        body: wasmparser::FunctionBody<'_>,
    ) -> Result<(), Error> {
        let mut out = self.new_function_with_parsed_locals(&body)?;
        self.poll(&mut out);
        for op in body.get_operators_reader()? {
            let op = op?;
            let is_loop = matches!(op, wasmparser::Operator::Loop { .. });
            out.instruction(&self.instruction(op)?);
            if is_loop {
                self.poll(&mut out);
            }
        }
        code.function(&out);
        Ok(())
    }
}
