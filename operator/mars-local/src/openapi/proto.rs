//! The protobuf form of the OpenAPI v2 document, for clients that read nothing else (kubectl up to 1.2x).
//!
//! Invariant: field numbers are those of the published `openapi.v2` protobuf schema; parts no client reads are left out.

use crate::meta::{map, text};
use prost::Message;
use serde_json::Value;

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "2")]
    yaml: String,
}

#[derive(Clone, PartialEq, Message)]
struct NamedAny {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Document {
    #[prost(string, tag = "1")]
    swagger: String,
    #[prost(message, optional, tag = "2")]
    info: Option<Info>,
    #[prost(message, optional, tag = "8")]
    paths: Option<Paths>,
    #[prost(message, optional, tag = "9")]
    definitions: Option<Schemas>,
}

#[derive(Clone, PartialEq, Message)]
struct Info {
    #[prost(string, tag = "1")]
    title: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Paths {
    #[prost(message, repeated, tag = "2")]
    path: Vec<NamedPath>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedPath {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PathItem>,
}

#[derive(Clone, PartialEq, Message)]
struct PathItem {
    #[prost(message, optional, tag = "2")]
    get: Option<Operation>,
    #[prost(message, optional, tag = "3")]
    put: Option<Operation>,
    #[prost(message, optional, tag = "4")]
    post: Option<Operation>,
    #[prost(message, optional, tag = "5")]
    delete: Option<Operation>,
    #[prost(message, optional, tag = "8")]
    patch: Option<Operation>,
}

#[derive(Clone, PartialEq, Message)]
struct Operation {
    #[prost(string, tag = "5")]
    id: String,
    #[prost(message, repeated, tag = "8")]
    parameters: Vec<ParametersItem>,
    #[prost(message, optional, tag = "9")]
    responses: Option<Responses>,
    #[prost(message, repeated, tag = "13")]
    extensions: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct ParametersItem {
    #[prost(message, optional, tag = "1")]
    parameter: Option<Parameter>,
}

#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(message, optional, tag = "2")]
    non_body: Option<NonBodyParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct NonBodyParameter {
    #[prost(message, optional, tag = "3")]
    query: Option<QueryParameter>,
}

#[derive(Clone, PartialEq, Message)]
struct QueryParameter {
    #[prost(string, tag = "2")]
    location: String,
    #[prost(string, tag = "4")]
    name: String,
    #[prost(string, tag = "6")]
    ty: String,
}

#[derive(Clone, PartialEq, Message)]
struct Responses {
    #[prost(message, repeated, tag = "1")]
    code: Vec<NamedResponse>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedResponse {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<ResponseValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseValue {
    #[prost(message, optional, tag = "1")]
    response: Option<ResponseBody>,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseBody {
    #[prost(string, tag = "1")]
    description: String,
}

#[derive(Clone, PartialEq, Message)]
struct Schemas {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<NamedSchema>,
}

#[derive(Clone, PartialEq, Message)]
struct NamedSchema {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    value: Option<SchemaMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct SchemaMessage {
    #[prost(string, tag = "2")]
    format: String,
    #[prost(string, tag = "4")]
    description: String,
    #[prost(string, repeated, tag = "19")]
    required: Vec<String>,
    #[prost(message, optional, boxed, tag = "21")]
    additional: Option<Box<Additional>>,
    #[prost(message, optional, tag = "22")]
    ty: Option<TypeItem>,
    #[prost(message, optional, tag = "23")]
    items: Option<Items>,
    #[prost(message, optional, tag = "25")]
    properties: Option<Schemas>,
    #[prost(message, repeated, tag = "31")]
    extensions: Vec<NamedAny>,
}

#[derive(Clone, PartialEq, Message)]
struct Additional {
    #[prost(message, optional, boxed, tag = "1")]
    schema: Option<Box<SchemaMessage>>,
}

#[derive(Clone, PartialEq, Message)]
struct TypeItem {
    #[prost(string, repeated, tag = "1")]
    value: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Items {
    #[prost(message, repeated, tag = "1")]
    schema: Vec<SchemaMessage>,
}

/// The document in protobuf.
pub(super) fn encode(document: &Value) -> Vec<u8> {
    let path = |(name, item): (&String, &Value)| NamedPath {
        name: name.clone(),
        value: Some(path_item(item)),
    };
    Document {
        swagger: text(document, &["swagger"]).into(),
        info: Some(Info {
            title: text(document, &["info", "title"]).into(),
            version: text(document, &["info", "version"]).into(),
        }),
        paths: Some(Paths {
            path: map(document, &["paths"]).iter().map(path).collect(),
        }),
        definitions: Some(schemas(document, &["definitions"])),
    }
    .encode_to_vec()
}

fn path_item(item: &Value) -> PathItem {
    let get = |verb: &str| item.get(verb).map(operation);
    PathItem {
        get: get("get"),
        put: get("put"),
        post: get("post"),
        delete: get("delete"),
        patch: get("patch"),
    }
}

fn operation(operation: &Value) -> Operation {
    let query = |parameter: &Value| ParametersItem {
        parameter: Some(Parameter {
            non_body: Some(NonBodyParameter {
                query: Some(QueryParameter {
                    location: "query".into(),
                    name: text(parameter, &["name"]).into(),
                    ty: text(parameter, &["type"]).into(),
                }),
            }),
        }),
    };
    let response = |(code, response): (&String, &Value)| NamedResponse {
        name: code.clone(),
        value: Some(ResponseValue {
            response: Some(ResponseBody {
                description: text(response, &["description"]).into(),
            }),
        }),
    };
    Operation {
        id: text(operation, &["operationId"]).into(),
        parameters: operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .map(query)
            .collect(),
        responses: Some(Responses {
            code: map(operation, &["responses"]).iter().map(response).collect(),
        }),
        extensions: extensions(operation),
    }
}

/// The `x-` fields. Values are YAML in the protobuf form; JSON is YAML.
fn extensions(value: &Value) -> Vec<NamedAny> {
    let extension = |(name, value): (&String, &Value)| NamedAny {
        name: name.clone(),
        value: Some(Any {
            yaml: serde_yaml::to_string(value).unwrap_or_default(),
        }),
    };
    map(value, &[])
        .iter()
        .filter(|(name, _)| name.starts_with("x-"))
        .map(extension)
        .collect()
}

fn schemas(value: &Value, path: &[&str]) -> Schemas {
    let named = |(name, value): (&String, &Value)| NamedSchema {
        name: name.clone(),
        value: Some(schema(value)),
    };
    Schemas {
        entries: map(value, path).iter().map(named).collect(),
    }
}

fn schema(value: &Value) -> SchemaMessage {
    let required = value["required"].as_array().into_iter().flatten();
    SchemaMessage {
        format: text(value, &["format"]).into(),
        description: text(value, &["description"]).into(),
        required: required.filter_map(Value::as_str).map(ToOwned::to_owned).collect(),
        additional: value.get("additionalProperties").filter(|of| of.is_object()).map(|of| {
            Box::new(Additional {
                schema: Some(Box::new(schema(of))),
            })
        }),
        ty: value.get("type").and_then(Value::as_str).map(|ty| TypeItem {
            value: vec![ty.to_owned()],
        }),
        items: value.get("items").map(|items| Items {
            schema: vec![schema(items)],
        }),
        properties: value.get("properties").map(|_| schemas(value, &["properties"])),
        extensions: extensions(value),
    }
}
