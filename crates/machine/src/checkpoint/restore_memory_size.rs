//! The memory size of a machine that is restored from a checkpoint, to find room for it
//! before it is read.

use super::layout::Layout;
use super::origin::Origin;
use super::repository::{Repository, RepositoryError};

/// Memory size in bytes of a machine restored from a checkpoint: the named one, or the
/// newest whose manifests can be read. If all its memories together are no larger than
/// `most`, it is that one.
///
/// # Errors
/// [`RepositoryError`].
pub async fn memory_bytes(
    repository: &Repository,
    origin: &Origin,
    most: u64,
) -> Result<u64, RepositoryError> {
    let candidates = match &origin.id {
        Some(id) => vec![id.clone()],
        None => repository.list(&origin.machine).await?,
    };
    let mut damaged = None;
    for id in &candidates {
        let part = |reason: &str| RepositoryError::Part {
            machine: origin.machine.clone(),
            id: id.clone(),
            part: "its chain".into(),
            reason: reason.to_owned(),
        };
        let bytes = async {
            let newest = repository.manifest(&origin.machine, id).await?;
            let pages = newest.memory_pages.iter();
            let all = pages.fold(0u64, |all, pages| all.saturating_add(pages << 16));
            if all <= most {
                return Ok(all);
            }
            let chain = repository.chain(&origin.machine, id).await?;
            Layout::new(&chain).map_err(part).map(|it| it.bytes())
        };
        match bytes.await {
            Ok(bytes) => return Ok(bytes),
            Err(error @ RepositoryError::Part { .. }) => damaged = damaged.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(damaged.unwrap_or_else(|| RepositoryError::None(origin.machine.clone())))
}
