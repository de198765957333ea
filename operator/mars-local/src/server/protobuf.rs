//! Bodies in the protobuf form of the Kubernetes API, which typed clients (`kubectl create namespace`) send.
//!
//! Only the kinds such commands make are read. Field numbers are those of the published `generated.proto` files.
//! Invariant: a field that is not known here is refused, never dropped.

use base64::Engine as _;
use serde_json::{Map, Value};

/// Media type of these bodies.
pub(super) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// First bytes of each body.
const MAGIC: &[u8] = b"k8s\0";

#[derive(Clone, Copy)]
enum Shape {
    Text,
    Texts,
    Flag,
    Number,
    TextMap,
    BytesMap,
    Message(&'static [Field]),
    /// Set by the server anyway.
    Ignored,
}

type Field = (u32, &'static str, Shape);

const METADATA: &[Field] = &[
    (1, "name", Shape::Text),
    (2, "generateName", Shape::Text),
    (3, "selfLink", Shape::Ignored),
    (4, "namespace", Shape::Text),
    (5, "uid", Shape::Text),
    (6, "resourceVersion", Shape::Text),
    (7, "generation", Shape::Ignored),
    (8, "creationTimestamp", Shape::Ignored),
    (9, "deletionTimestamp", Shape::Ignored),
    (10, "deletionGracePeriodSeconds", Shape::Number),
    (11, "labels", Shape::TextMap),
    (12, "annotations", Shape::TextMap),
    (14, "finalizers", Shape::Texts),
];
const NAMESPACE: &[Field] = &[
    (1, "metadata", Shape::Message(METADATA)),
    (2, "spec", Shape::Message(&[(1, "finalizers", Shape::Texts)])),
    (3, "status", Shape::Message(&[(1, "phase", Shape::Text)])),
];
const CONFIG_MAP: &[Field] = &[
    (1, "metadata", Shape::Message(METADATA)),
    (2, "data", Shape::TextMap),
    (3, "binaryData", Shape::BytesMap),
    (4, "immutable", Shape::Flag),
];
const SECRET: &[Field] = &[
    (1, "metadata", Shape::Message(METADATA)),
    (2, "data", Shape::BytesMap),
    (3, "type", Shape::Text),
    (4, "stringData", Shape::TextMap),
    (5, "immutable", Shape::Flag),
];
const TYPE: &[Field] = &[(1, "apiVersion", Shape::Text), (2, "kind", Shape::Text)];

/// One field as it is on the wire.
enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Takes a varint off the front.
fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().ok_or("the message ends in a number")?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number is longer than 64 bits".into())
}

/// Takes a field off the front: its number and content.
fn field<'a>(bytes: &mut &'a [u8]) -> Result<(u32, Wire<'a>), String> {
    let tag = varint(bytes)?;
    let number = u32::try_from(tag >> 3).map_err(|_| "a field number is too large")?;
    match tag & 7 {
        0 => Ok((number, Wire::Number(varint(bytes)?))),
        2 => {
            let length = usize::try_from(varint(bytes)?).map_err(|_| "a length is too large")?;
            if length > bytes.len() {
                return Err(format!("field {number} is longer than the message"));
            }
            let (content, rest) = bytes.split_at(length);
            *bytes = rest;
            Ok((number, Wire::Bytes(content)))
        }
        other => Err(format!("field {number} has the wire type {other}")),
    }
}

fn text(bytes: &[u8]) -> Result<Value, String> {
    std::str::from_utf8(bytes)
        .map(Into::into)
        .map_err(|_| "a text is no UTF-8".into())
}

fn base64(bytes: &[u8]) -> Value {
    base64::engine::general_purpose::STANDARD.encode(bytes).into()
}

/// A map entry: key and raw value.
fn entry(mut bytes: &[u8]) -> Result<(String, &[u8]), String> {
    let (mut key, mut value): (&[u8], &[u8]) = (&[], &[]);
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (1, Wire::Bytes(content)) => key = content,
            (2, Wire::Bytes(content)) => value = content,
            (number, _) => return Err(format!("field {number} of a map entry is not known")),
        }
    }
    let key = std::str::from_utf8(key).map_err(|_| "a map key is no UTF-8")?;
    Ok((key.to_owned(), value))
}

fn message(mut bytes: &[u8], fields: &[Field]) -> Result<Map<String, Value>, String> {
    let mut object = Map::new();
    while !bytes.is_empty() {
        let (number, content) = field(&mut bytes)?;
        let (_, name, shape) = fields
            .iter()
            .find(|(known, ..)| *known == number)
            .ok_or_else(|| format!("field {number} is not known here; send JSON"))?;
        let value = match (shape, content) {
            (Shape::Ignored, _) | (Shape::Text, Wire::Bytes(b"")) => continue,
            (Shape::Text, Wire::Bytes(content)) => text(content)?,
            (Shape::Flag, Wire::Number(flag)) => (flag != 0).into(),
            (Shape::Number, Wire::Number(number)) => number.into(),
            (Shape::Message(fields), Wire::Bytes(content)) => Value::Object(message(content, fields)?),
            (Shape::Texts, Wire::Bytes(content)) => {
                let list = object.entry(*name).or_insert_with(|| Value::Array(Vec::new()));
                list.as_array_mut()
                    .ok_or("a list and a value share a name")?
                    .push(text(content)?);
                continue;
            }
            (Shape::TextMap | Shape::BytesMap, Wire::Bytes(content)) => {
                let (key, value) = entry(content)?;
                let value = if matches!(shape, Shape::BytesMap) {
                    base64(value)
                } else {
                    text(value)?
                };
                crate::meta::object_mut(object.entry(*name).or_insert_with(|| Map::new().into())).insert(key, value);
                continue;
            }
            _ => return Err(format!("field {number} ({name}) has another type than it should")),
        };
        object.insert((*name).to_owned(), value);
    }
    Ok(object)
}

/// A body as the JSON form of the same object.
///
/// # Errors
/// What is not understood.
pub(super) fn decode(body: &[u8]) -> Result<Value, String> {
    let mut bytes = body.strip_prefix(MAGIC).ok_or("it does not begin with k8s\\0")?;
    let (mut types, mut raw): (&[u8], &[u8]) = (&[], &[]);
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (1, Wire::Bytes(content)) => types = content,
            (2, Wire::Bytes(content)) => raw = content,
            (3 | 4, Wire::Bytes(b"")) => {}
            (number, _) => return Err(format!("field {number} of the envelope is not known")),
        }
    }
    let types = message(types, TYPE)?;
    let word = |name: &str| types.get(name).and_then(Value::as_str).unwrap_or_default();
    let fields = match (word("apiVersion"), word("kind")) {
        ("v1", "Namespace") => NAMESPACE,
        ("v1", "ConfigMap") => CONFIG_MAP,
        ("v1", "Secret") => SECRET,
        (version, kind) => return Err(format!("{kind} of {version} is not read in this form; send JSON")),
    };
    let mut object = message(raw, fields)?;
    object.extend(types);
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut out = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        out.extend_from_slice(content);
        out
    }

    fn secret(extra: &[u8]) -> Vec<u8> {
        let types = [bytes(1, b"v1"), bytes(2, b"Secret")].concat();
        let metadata = [bytes(1, b"s"), bytes(8, b"")].concat();
        let entry = [bytes(1, b"k"), bytes(2, b"\xff\x00")].concat();
        let raw = [
            bytes(1, &metadata),
            bytes(2, &entry),
            bytes(3, b"Opaque"),
            extra.to_vec(),
        ]
        .concat();
        [
            MAGIC.to_vec(),
            bytes(1, &types),
            bytes(2, &raw),
            bytes(3, b""),
            bytes(4, b""),
        ]
        .concat()
    }

    #[test]
    fn a_secret_is_read_and_an_unknown_field_is_refused() {
        let expected = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {"k": "/wA="}, "type": "Opaque"});
        assert_eq!(decode(&secret(&[])).unwrap(), expected);
        assert!(decode(&secret(&bytes(9, b"?"))).unwrap_err().contains("field 9"));
        let whole = secret(&[]);
        for cut in 0..whole.len() {
            // Never a panic; what is cut in the middle of a field is an error.
            let _ = decode(&whole[..cut]);
        }
    }
}
