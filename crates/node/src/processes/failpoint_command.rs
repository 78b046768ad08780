//! Sets or clears a failpoint in this process or in the workers of its machines, present and
//! future.

use super::handle::Processes;
use super::injections_for_new_workers::injections;
use super::workers::PROMPT;
use crate::error::CommandError;
use keel_api::FailpointRequest;
use keel_machine::failpoint::{self, Injection};
use keel_machine::worker::control::kind;

impl Processes {
    /// Sets or clears a failpoint in this process or in all workers.
    ///
    /// # Errors
    /// [`CommandError`] if there is no such failpoint or order.
    pub(crate) async fn order_failpoint(
        &self,
        request: FailpointRequest,
    ) -> Result<(), CommandError> {
        let failpoint = failpoint::find(&request.name).ok_or_else(|| {
            CommandError::NotFound(format!("there is no failpoint {:?}", request.name))
        })?;
        let order: Option<Injection> = request
            .order
            .as_deref()
            .map(str::parse)
            .transpose()
            .map_err(|error: failpoint::InvalidInjection| {
                CommandError::Invalid(error.to_string())
            })?;
        if !failpoint.site.is_worker() {
            failpoint::set(failpoint.name, order);
            return Ok(());
        }
        match order {
            Some(order) => injections().insert(failpoint.name, order),
            None => injections().remove(failpoint.name),
        };
        let question = (request.name.clone(), request.order.clone());
        for machine in self.machines.names() {
            if let Some(worker) = self.machines.get(&machine) {
                let told: Result<(), _> = worker.ask(kind::FAILPOINT, &question, PROMPT).await;
                if let Err(error) = told {
                    tracing::debug!(%machine, %error, "cannot set a failpoint in a worker");
                }
            }
        }
        Ok(())
    }
}
