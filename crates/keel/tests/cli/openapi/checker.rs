//! Checks exchanges against a description in OpenAPI 3.1. It is stricter than the description: no
//! field may be sent that is not described, also where others would be ignored.

use super::recorder::{Exchange, Message};
use serde_json::Value;
use std::collections::BTreeSet;

pub(crate) struct Description {
    document: Value,
    /// Its components, with objects closed.
    components: Value,
}

/// An operation of the description.
pub(crate) struct Operation<'a> {
    pub(crate) id: &'a str,
    value: &'a Value,
}

impl Description {
    pub(crate) fn new(document: Value) -> Self {
        let mut components = document["components"].clone();
        let schemas = components["schemas"].as_object_mut().expect("schemas");
        // What a schema of several ones does not know may be known to another.
        let partial: BTreeSet<String> = schemas
            .values()
            .filter_map(|schema| schema["allOf"].as_array())
            .flatten()
            .filter_map(|part| part["$ref"].as_str())
            .map(str::to_owned)
            .collect();
        for (name, schema) in schemas {
            if !partial.contains(&format!("#/components/schemas/{name}")) {
                close(schema);
            }
        }
        Description {
            document,
            components,
        }
    }

    /// The ids of all operations.
    pub(crate) fn ids(&self) -> BTreeSet<&str> {
        let paths = self.document["paths"].as_object().expect("paths");
        let operations = paths.values().filter_map(Value::as_object).flatten();
        operations
            .filter_map(|(_, operation)| operation["operationId"].as_str())
            .collect()
    }

    /// Paths with the methods that they have.
    pub(crate) fn paths(&self) -> impl Iterator<Item = (&str, BTreeSet<String>)> {
        let paths = self.document["paths"].as_object().expect("paths");
        paths.iter().map(|(path, item)| {
            let methods = item.as_object().expect("operations").keys();
            let methods = methods.map(|method| method.to_ascii_uppercase());
            (path.as_str(), methods.collect())
        })
    }

    /// The operation of a request.
    pub(crate) fn operation(&self, method: &str, path: &str) -> Result<Operation<'_>, String> {
        let paths = self.document["paths"].as_object().ok_or("no paths")?;
        let fits = |template: &&String| {
            let (one, other) = (template.split('/'), path.split('/'));
            one.clone().count() == other.clone().count()
                && one
                    .zip(other)
                    .all(|(one, other)| one == other || one.starts_with('{'))
        };
        // Of two that fit the one with fewer parameters is meant.
        let template = paths
            .keys()
            .filter(fits)
            .min_by_key(|it| it.matches('{').count());
        let template = template.ok_or_else(|| format!("path {path} is not described"))?;
        let value = paths[template].get(method.to_ascii_lowercase());
        let value = value.ok_or_else(|| format!("{method} {template} is not described"))?;
        let id = value["operationId"].as_str().ok_or("no id")?;
        Ok(Operation { id, value })
    }

    /// Checks a request and its answer; returns the id of the operation.
    pub(crate) fn check(&self, exchange: &Exchange) -> Result<&str, String> {
        let (path, query) = match exchange.target.split_once('?') {
            Some((path, query)) => (path, query),
            None => (exchange.target.as_str(), ""),
        };
        let operation = self.operation(&exchange.method, path)?;
        let checked = self
            .check_query(&operation, query)
            .and_then(|()| self.check_request(&operation, &exchange.request))
            .and_then(|()| self.check_response(&operation, exchange.status, &exchange.response));
        checked.map_err(|error| format!("{} {}: {error}", exchange.method, exchange.target))?;
        Ok(operation.id)
    }

    fn check_query(&self, operation: &Operation<'_>, query: &str) -> Result<(), String> {
        let parameters: Vec<&Value> = operation.value["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|parameter| parameter["in"] == "query")
            .collect();
        let sent: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
        for (name, value) in &sent {
            let parameter = parameters.iter().find(|it| it["name"] == **name);
            let parameter =
                parameter.ok_or_else(|| format!("parameter {name} is not described"))?;
            // A number or a truth value, or else text.
            let value = serde_json::from_str(value)
                .ok()
                .filter(|value: &Value| value.is_number() || value.is_boolean())
                .filter(|_| !is_text(&parameter["schema"]))
                .unwrap_or_else(|| Value::String(value.to_string()));
            self.check_value(&parameter["schema"], &value)
                .map_err(|error| format!("parameter {name}: {error}"))?;
        }
        let missing = parameters.iter().find(|parameter| {
            parameter["required"] == true && !sent.iter().any(|it| parameter["name"] == *it.0)
        });
        match missing {
            Some(parameter) => Err(format!("parameter {} is missing", parameter["name"])),
            None => Ok(()),
        }
    }

    fn check_request(&self, operation: &Operation<'_>, request: &Message) -> Result<(), String> {
        let content = &operation.value["requestBody"]["content"];
        if content.is_null() {
            // A client may send that there is nothing.
            return match request.body.as_slice() {
                b"" | b"null" => Ok(()),
                _ => Err("its body is not described".to_owned()),
            };
        }
        match content.get("application/json") {
            Some(described) => self.check_json(&described["schema"], &request.body),
            None => Ok(()),
        }
    }

    fn check_response(
        &self,
        operation: &Operation<'_>,
        status: u16,
        response: &Message,
    ) -> Result<(), String> {
        let responses = &operation.value["responses"];
        let described = responses
            .get(status.to_string())
            .or_else(|| responses.get(format!("{}XX", status / 100)))
            .ok_or_else(|| format!("status {status} is not described"))?;
        let described = match described["$ref"].as_str() {
            Some(reference) => self.document.pointer(reference.trim_start_matches('#')),
            None => Some(described),
        };
        let content = &described.ok_or("a reference leads nowhere")?["content"];
        let media = content.as_object().into_iter().flatten();
        let media = media
            .map(|(name, value)| (name.split(';').next().unwrap_or_default(), value))
            .find(|(name, _)| *name == response.content);
        let Some((name, described)) = media else {
            return Err(format!("content {:?} is not described", response.content));
        };
        let schema = &described["schema"];
        match name {
            "application/json" => self.check_json(schema, &response.body),
            "application/x-ndjson" => response
                .body
                .split_inclusive(|byte| *byte == b'\n')
                .filter(|line| line.ends_with(b"\n"))
                .try_for_each(|line| self.check_json(schema, line)),
            _ => Ok(()),
        }
    }

    fn check_json(&self, schema: &Value, text: &[u8]) -> Result<(), String> {
        let value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        self.check_value(schema, &value)
    }

    fn check_value(&self, schema: &Value, value: &Value) -> Result<(), String> {
        let mut root = schema.clone();
        root["components"] = self.components.clone();
        let schema = jsonschema::draft202012::new(&root).map_err(|error| error.to_string())?;
        let errors: Vec<String> = schema
            .iter_errors(value)
            .map(|error| format!("at {:?}: {error}", error.instance_path().to_string()))
            .collect();
        match errors.is_empty() {
            true => Ok(()),
            false => Err(format!("{}; in {value}", errors.join("; "))),
        }
    }
}

/// Whether a schema is that of text alone.
fn is_text(schema: &Value) -> bool {
    match &schema["type"] {
        Value::Array(types) => types.contains(&"string".into()),
        other => other == "string",
    }
}

/// Forbids fields that a schema does not have.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if fields.get("properties").is_some_and(Value::is_object) {
                let closed = Value::Bool(false);
                fields.entry("additionalProperties").or_insert(closed);
            }
            let parts = fields.iter_mut().filter(|(name, _)| *name != "allOf");
            parts.for_each(|(_, part)| close(part));
        }
        Value::Array(parts) => parts.iter_mut().for_each(close),
        _ => {}
    }
}
