//! The error of all passes: why a module is refused.

/// Why a module cannot become a machine.
#[derive(Debug, thiserror::Error)]
pub enum InstrumentError {
    /// Invalid WebAssembly, or an unsupported proposal.
    #[error("the module is not valid here: {0}")]
    Invalid(#[from] wasmparser::BinaryReaderError),
    /// It uses an unsupported feature.
    #[error("the module uses {what} ({place}), which machines do not support")]
    Unsupported {
        what: String,
        /// The place, or a remedy.
        place: String,
    },
    #[error("the module is malformed: {0}")]
    Malformed(String),
}

impl From<wasm_encoder::reencode::Error> for InstrumentError {
    fn from(error: wasm_encoder::reencode::Error) -> Self {
        InstrumentError::Malformed(error.to_string())
    }
}
