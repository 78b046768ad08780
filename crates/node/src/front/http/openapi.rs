//! The description of the API in OpenAPI. It is made from the handlers that the router has, so that
//! each request is described, and where it is handled.

use super::super::handles::Handles;
use super::caller::needed_role;
use axum::Router;
use axum::extract::Extension;
use axum::http::{Method, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use keel_api::{PlanGoal, Problem, TokenRequest, VolumeRequest};
use keel_balance::rules::Rule;
use serde_json::Value;
use std::sync::Arc;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, Info, KnownFormat, License, ObjectBuilder, OpenApi,
    OpenApiBuilder, Ref, RefOr, ResponseBuilder, Schema, SchemaFormat, Tag, Type,
};
use utoipa::{PartialSchema, ToSchema};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

/// Name of the security scheme, and of the response that all errors have.
const TOKEN: &str = "token";
const PROBLEM: &str = "Problem";

const ABOUT: &str = "Evenkeel: a self-balancing cluster of virtual machines. Each node answers all \
    requests, on its own socket without a token and over TLS with one. The security requirement of \
    a request names the role that its token needs; a role includes the lesser ones.";

/// What the tags of requests stand for.
const TAGS: [(&str, &str); 17] = [
    ("cluster", "The cluster, and the node that answers."),
    ("nodes", "Nodes, their drains and loads."),
    (
        "store",
        "The store of the cluster, and the nodes that hold it.",
    ),
    ("images", "Files that machines start from."),
    ("machines", "Machines, and what is requested of one."),
    ("moves", "Moves of machines."),
    ("parts", "Parts, threads and objects of spanning machines."),
    ("files", "Files in the volumes of machines."),
    (
        "checkpoints",
        "Checkpoints, and machines restored from them.",
    ),
    ("volumes", "Volumes of the cluster."),
    ("balancing", "Balancing, and its decisions."),
    ("plans", "Plans of moves."),
    ("rules", "Placement rules and labels."),
    ("events", "What happened."),
    ("tokens", "Tokens of nodes and users."),
    ("audit", "Who did what."),
    ("health", "For those who watch a node."),
];

/// Handlers with their descriptions: none can be added without its own.
pub(super) struct DescribedRoutes(OpenApiRouter<Arc<Handles>>);

impl DescribedRoutes {
    pub(super) fn new() -> Self {
        DescribedRoutes(OpenApiRouter::with_openapi(without_requests()))
    }

    /// Adds the handlers of one path, as `routes!` collects them.
    pub(super) fn add(self, handlers: UtoipaMethodRouter<Arc<Handles>>) -> Self {
        #[cfg(test)]
        self.check_names(&handlers.0);
        DescribedRoutes(self.0.routes(handlers))
    }

    /// Panics if two types have the same name: one of them would be described wrongly.
    #[cfg(test)]
    fn check_names(&self, schemas: &[(String, RefOr<Schema>)]) {
        let components = self.0.get_openapi().components.as_ref();
        for (name, schema) in schemas {
            let before = components.and_then(|it| it.schemas.get(name));
            assert!(before.is_none_or(|it| it == schema), "two types {name}");
        }
    }

    /// The router, and the complete description of it.
    pub(super) fn split(self) -> (Router<Arc<Handles>>, OpenApi) {
        let (router, mut description) = self.0.split_for_parts();
        for (path, item) in &mut description.paths.paths {
            for (method, operation) in operations(item) {
                complete(&method, path, operation);
            }
        }
        (router, description)
    }
}

/// The description as it is served.
#[derive(Clone)]
pub(super) struct Document(Bytes);

impl Document {
    pub(super) fn new(description: &OpenApi) -> Result<Self, serde_json::Error> {
        Ok(Document(serde_json::to_vec(&as_json(description)?)?.into()))
    }
}

/// Bytes that are not JSON.
pub(super) struct RawBytes;

impl PartialSchema for RawBytes {
    fn schema() -> RefOr<Schema> {
        let bytes = ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)));
        bytes.into()
    }
}

impl ToSchema for RawBytes {}

/// This description of all requests, in OpenAPI 3.1.
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    operation_id = "get_openapi",
    tag = "cluster",
    responses((status = 200, description = "Success", body = Object))
)]
pub(super) async fn document(Extension(Document(bytes)): Extension<Document>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], bytes).into_response()
}

fn without_requests() -> OpenApi {
    let mut info = Info::new("Evenkeel", env!("CARGO_PKG_VERSION"));
    info.description = Some(ABOUT.to_owned());
    let mut license = License::new("MIT OR Apache-2.0");
    license.identifier = Some("MIT OR Apache-2.0".into());
    info.license = Some(license);
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("A token of `keel token user`."))
        .build();
    let problem = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(Problem::name())))
        .build();
    let problem = ResponseBuilder::new()
        .description("The error, and its remedy")
        .content("application/json", problem)
        .build();
    let components = ComponentsBuilder::new()
        .security_scheme(TOKEN, SecurityScheme::Http(scheme))
        .schema(Problem::name(), Problem::schema())
        .response(PROBLEM, problem)
        .build();
    let tags = TAGS.map(|(name, about)| {
        let mut tag = Tag::new(name);
        tag.description = Some(about.to_owned());
        tag
    });
    OpenApiBuilder::new()
        .info(info)
        .components(Some(components))
        .tags(Some(tags))
        .build()
}

/// The operations of a path, by their methods.
fn operations(item: &mut PathItem) -> impl Iterator<Item = (Method, &mut Operation)> {
    let all = [
        (Method::GET, &mut item.get),
        (Method::PUT, &mut item.put),
        (Method::POST, &mut item.post),
        (Method::DELETE, &mut item.delete),
        (Method::OPTIONS, &mut item.options),
        (Method::HEAD, &mut item.head),
        (Method::PATCH, &mut item.patch),
        (Method::TRACE, &mut item.trace),
    ];
    all.into_iter()
        .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Adds what all operations have: the role that is needed, and errors.
fn complete(method: &Method, path: &str, operation: &mut Operation) {
    let (role, security) = match needed_role(method, path) {
        Some(role) => {
            let role = role.to_string();
            (role.clone(), vec![SecurityRequirement::new(TOKEN, [role])])
        }
        None => ("none".to_owned(), Vec::new()),
    };
    operation.security = Some(security);
    let extensions = operation.extensions.get_or_insert_default();
    extensions.insert("x-role".to_owned(), role.into());
    for status in ["4XX", "5XX"] {
        let problem = RefOr::Ref(Ref::from_response_name(PROBLEM));
        operation
            .responses
            .responses
            .insert(status.to_owned(), problem);
    }
}

/// The description with what its derivation cannot say.
fn as_json(description: &OpenApi) -> Result<Value, serde_json::Error> {
    let mut document = serde_json::to_value(description)?;
    correct(&mut document);
    if let Some(Value::Object(schemas)) = document.pointer_mut("/components/schemas") {
        for (name, schema) in schemas {
            let strict = [
                TokenRequest::name(),
                PlanGoal::name(),
                VolumeRequest::name(),
            ];
            close_variants(schema, strict.contains(&name.as_str().into()));
            if *name == Rule::name() {
                // Its fields are those of two schemas: neither knows all.
                schema["unevaluatedProperties"] = Value::Bool(false);
            }
        }
    }
    Ok(document)
}

/// Says that variants of an enum have no other fields than the described ones: of their only field
/// that names the variant always, of the fields in it if the type is `strict`, as
/// `deny_unknown_fields` makes it.
fn close_variants(schema: &mut Value, strict: bool) {
    let Some(Value::Array(variants)) = schema.get_mut("oneOf") else {
        return;
    };
    for variant in variants {
        let Some(Value::Object(fields)) = variant.get_mut("properties") else {
            continue;
        };
        let mut contents = fields.values_mut();
        let named = match (contents.next(), contents.next()) {
            // A constant is the tag beside the fields of the variant.
            (Some(content), None) if content.get("enum").is_none() => {
                if strict && content.get("properties").is_some() {
                    content["additionalProperties"] = Value::Bool(false);
                }
                true
            }
            _ => false,
        };
        if named || strict {
            variant["additionalProperties"] = Value::Bool(false);
        }
    }
}

/// Descriptions are documentation of the code, whose links lead nowhere in the document; and formats
/// of unsigned numbers have names of their own (OpenAPI's registry of formats).
fn correct(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match (name.as_str(), field) {
                    ("description", Value::String(text)) => *text = without_links(text),
                    ("format", Value::String(format)) => {
                        if let Some(bits) = format.strip_prefix("u-int") {
                            *format = format!("uint{bits}");
                        }
                    }
                    (_, other) => correct(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(correct),
        _ => {}
    }
}

/// ``[`Name`]``, ``[`module::Name`]`` and ``[`Name`](path)`` as `` `Name` ``.
fn without_links(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("[`") {
        let Some((name, after)) = link.split_once("`]") else {
            break;
        };
        let modules = name
            .split("::")
            .take_while(|part| part.starts_with(char::is_lowercase));
        let modules = modules.map(|part| part.len() + "::".len()).sum::<usize>();
        plain.extend([before, "`", name.get(modules..).unwrap_or(name), "`"]);
        rest = match after
            .strip_prefix('(')
            .and_then(|path| path.split_once(')'))
        {
            Some((_, after)) => after,
            None => after,
        };
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::super::router::described;
    use super::*;
    use keel_api::{HighAvailabilityChange, RunRequest, SetRequest};
    use std::collections::BTreeSet;

    fn document() -> Value {
        let (_, description) = described().split();
        as_json(&description).unwrap()
    }

    /// All operations, with method and path.
    fn all(document: &Value) -> Vec<(String, String, &Value)> {
        let paths = document["paths"].as_object().unwrap();
        let operations = paths.iter().flat_map(|(path, item)| {
            let operations = item.as_object().unwrap().iter();
            operations.map(|(method, it)| (method.to_uppercase(), path.clone(), it))
        });
        operations.collect()
    }

    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str));
                fields.values().for_each(|field| references(field, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn openapi_references_lead_somewhere() {
        let document = document();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 100);
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let text = document.to_string();
        for odd in ["[`", "u-int", "crate::"] {
            assert!(!text.contains(odd), "{odd}");
        }
    }

    #[test]
    fn openapi_operations_are_complete() {
        let document = document();
        let tags: BTreeSet<&str> = TAGS.iter().map(|(name, _)| *name).collect();
        let (mut ids, mut used) = (BTreeSet::new(), BTreeSet::new());
        for (method, path, operation) in all(&document) {
            let id = operation["operationId"].as_str().unwrap();
            assert!(ids.insert(id), "{id} twice");
            let summary = operation["summary"].as_str().unwrap_or_default();
            assert!(summary.ends_with('.'), "{id}: {summary}");
            let tag = operation["tags"][0].as_str().unwrap();
            assert!(tags.contains(tag), "{id}: {tag}");
            used.insert(tag);
            let responses = &operation["responses"];
            for status in ["4XX", "5XX"] {
                assert!(responses[status].is_object(), "{id} {status}");
            }
            // Some become WebSockets.
            let succeeds = ["200", "101"].map(|status| responses[status].is_object());
            assert!(succeeds.contains(&true), "{id}");
            let role = needed_role(&method.parse().unwrap(), &path);
            let role = role.map_or("none".to_owned(), |role| role.to_string());
            assert_eq!(operation["x-role"], role, "{id}");
            // Parameters are those of the path and of the query, and described.
            let parameters = operation["parameters"].as_array();
            let in_path = parameters.into_iter().flatten().filter(|it| {
                let about = it["description"].as_str().unwrap_or_default();
                assert!(about.ends_with('.'), "{id}: {it}");
                it["in"] == "path"
            });
            let in_path = in_path.map(|it| format!("{{{}}}", it["name"].as_str().unwrap()));
            let expected = path.split('/').filter(|part| part.starts_with('{'));
            let expected: Vec<&str> = expected.collect();
            assert_eq!(in_path.collect::<Vec<_>>(), expected, "{id}");
            let has_body = operation["requestBody"].is_object();
            assert!(!has_body || method != "GET", "{id}");
        }
        assert!(ids.len() > 50);
        assert_eq!(used, tags);
        assert!(!document.to_string().contains("debug"));
    }

    /// `routes!` makes handlers of several paths answer at each of them, and a router has routes
    /// that are not described where they are added to it.
    #[test]
    fn openapi_describes_all_routes() {
        let text = include_str!("router.rs");
        let handlers: Vec<&str> = text
            .split("routes!(")
            .skip(1)
            .filter_map(|rest| Some(rest.split_once(')')?.0))
            .flat_map(|handlers| handlers.split(','))
            .map(str::trim)
            .filter(|handler| handler.contains("::"))
            .collect();
        let document = document();
        assert_eq!(handlers.len(), all(&document).len());
        let added = text.matches(".route(").count() + text.matches(".nest").count();
        assert_eq!(added, 1, "the failpoints alone are not described");
        let paths = document["paths"].as_object().unwrap();
        assert_eq!(paths.len(), text.matches(".add(routes!(").count());
    }

    fn accepts(document: &Value, name: &str, value: &Value) -> bool {
        let mut schema = serde_json::json!({ "$ref": format!("#/components/schemas/{name}") });
        schema["components"] = document["components"].clone();
        jsonschema::draft202012::new(&schema)
            .unwrap()
            .is_valid(value)
    }

    fn decodes<T: serde::de::DeserializeOwned>(value: &Value) -> bool {
        serde_json::from_value::<T>(value.clone()).is_ok()
    }

    /// What a node refuses or accepts is refused or accepted by the description.
    #[test]
    fn openapi_is_as_strict_as_a_node() {
        let document = document();
        let run = |more: &str| {
            let fields = r#""kind":"wasm","kind_spec":{},"memory_bytes":1,"output_bytes_per_s":1"#;
            format!("{{{fields}{more}}}")
        };
        /// A type, whether a node decodes a value as it, and values with what is expected.
        type Case = (&'static str, fn(&Value) -> bool, Vec<(String, bool)>);
        let cases: [Case; 6] = [
            (
                "RunRequest",
                decodes::<RunRequest>,
                vec![
                    (run(""), true),
                    (run(r#","name":null,"ha":null,"restart":"always""#), true),
                    (run(r#","restart":"sometimes""#), false),
                    (run(r#","colour":"red""#), false),
                    (run(r#","ha":{"priority":3,"fence":"timer"}"#), true),
                    (run(r#","ha":{"importance":3}"#), false),
                    (run(r#","balancing":{"by":"off"}"#), true),
                    (run(r#","balancing":{"by":"off","for":1}"#), false),
                    (
                        run(r#","volumes":[{"kind":"tmp","bytes":1,"guest":"/t"}]"#),
                        true,
                    ),
                    (run(r#","volumes":[{"kind":"tmp","guest":"/t"}]"#), false),
                    (
                        run(r#","volumes":[{"kind":"tmp","bytes":1,"guest":"/t","host":"/"}]"#),
                        false,
                    ),
                    (r#"{"kind":"wasm"}"#.to_owned(), false),
                ],
            ),
            (
                "TokenRequest",
                decodes::<TokenRequest>,
                vec![
                    (r#"{"join":{"ttl_s":1}}"#.to_owned(), true),
                    (r#"{"join":{"ttl_s":1,"for":2}}"#.to_owned(), false),
                    (r#"{"join":{"ttl_s":-1}}"#.to_owned(), false),
                    (
                        r#"{"join":{"ttl_s":1},"user":{"name":"a","role":"b"}}"#.to_owned(),
                        false,
                    ),
                    (r#"{"user":{"name":"a","role":"viewer"}}"#.to_owned(), true),
                ],
            ),
            (
                "PlanGoal",
                decodes::<PlanGoal>,
                vec![
                    (r#""pack""#.to_owned(), true),
                    (r#"{"level":{}}"#.to_owned(), true),
                    (r#"{"level":{"moves_max":3}}"#.to_owned(), true),
                    (r#"{"level":{"most":3}}"#.to_owned(), false),
                    (r#"{"drain":{"node":"a"}}"#.to_owned(), true),
                    (r#"{"drain":{}}"#.to_owned(), false),
                ],
            ),
            (
                "Rule",
                decodes::<Rule>,
                vec![
                    (
                        r#"{"name":"a","rule":"stay","machines":{"names":["m"]}}"#.to_owned(),
                        true,
                    ),
                    (
                        r#"{"name":"a","rule":"apart","per":{"label":"zone"},"machines":{}}"#
                            .to_owned(),
                        true,
                    ),
                    (
                        r#"{"name":"a","rule":"apart","machines":{},"most":3}"#.to_owned(),
                        false,
                    ),
                    (
                        r#"{"name":"a","rule":"pin","machines":{}}"#.to_owned(),
                        false,
                    ),
                    (r#"{"rule":"stay","machines":{}}"#.to_owned(), false),
                ],
            ),
            (
                "HighAvailabilityChange",
                decodes::<HighAvailabilityChange>,
                vec![
                    (r#""off""#.to_owned(), true),
                    (r#"{"on":{}}"#.to_owned(), true),
                    (r#"{"on":{"replicas":2}}"#.to_owned(), true),
                    (r#"{"on":{"copies":2}}"#.to_owned(), false),
                ],
            ),
            (
                "SetRequest",
                decodes::<SetRequest>,
                vec![
                    ("{}".to_owned(), true),
                    (r#"{"checkpoints":"none","spawn":"here"}"#.to_owned(), true),
                    (r#"{"checkpoint":"none"}"#.to_owned(), false),
                ],
            ),
        ];
        for (name, decodes, values) in cases {
            for (text, accepted) in values {
                let value: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(decodes(&value), accepted, "{name}: a node, {text}");
                assert_eq!(accepts(&document, name, &value), accepted, "{name}: {text}");
            }
        }
    }

    #[test]
    fn links_of_the_documentation_are_removed() {
        for (text, expected) in [
            ("as in [`A::b`](crate::A::b).", "as in `A::b`."),
            ("[`A`], [`crate::a::B`], [`f`]", "`A`, `B`, `f`"),
            ("[0, 1] and [`open", "[0, 1] and [`open"),
        ] {
            assert_eq!(without_links(text), expected);
        }
    }
}
