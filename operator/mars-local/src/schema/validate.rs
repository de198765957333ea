//! Validation: every violation is reported with its path, in the words of the real API server.
//!
//! Invariant: validation reads only; it reports all violations, not the first one.

use super::{Additional, ListType, Schema, Type, join};
use crate::error::Cause;
use serde_json::Value;
use std::collections::BTreeSet;

impl Schema {
    /// All violations of the schema below `value`; `path` is where `value` is, empty for the object itself.
    #[must_use]
    pub fn validate(&self, value: &Value, path: &str) -> Vec<Cause> {
        let mut causes = Vec::new();
        self.check(value, path, &mut causes);
        causes
    }

    fn accepts(&self, value: &Value) -> bool {
        self.validate(value, "").is_empty()
    }

    fn check(&self, value: &Value, path: &str, causes: &mut Vec<Cause>) {
        if value.is_null() && self.nullable {
            return;
        }
        if let Some(expected) = self.type_mismatch(value) {
            causes.push(Cause::wrong_type(path, value, expected));
            return;
        }
        if !self.allowed.is_empty() && !self.allowed.contains(value) {
            causes.push(Cause::not_supported(path, value, &self.allowed));
        }
        match value {
            Value::Object(_) => self.check_object(value, path, causes),
            Value::Array(entries) => self.check_list(entries, path, causes),
            Value::String(text) => self.check_string(value, text, path, causes),
            Value::Number(number) => self.check_number(value, number.as_f64().unwrap_or(f64::NAN), path, causes),
            Value::Null | Value::Bool(_) => {}
        }
        self.check_combinations(value, path, causes);
    }

    fn type_mismatch(&self, value: &Value) -> Option<&'static str> {
        if self.int_or_string {
            let fits = value.is_string() || value.is_i64() || value.is_u64();
            return (!fits).then_some("integer,string");
        }
        let ty = self.ty?;
        let fits = match ty {
            Type::Object => value.is_object(),
            Type::Array => value.is_array(),
            Type::String => value.is_string(),
            Type::Integer => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|f| f.fract() == 0.0),
            Type::Number => value.is_number(),
            Type::Boolean => value.is_boolean(),
        };
        (!fits).then_some(ty.word())
    }

    fn check_object(&self, value: &Value, path: &str, causes: &mut Vec<Cause>) {
        let fields = crate::meta::map(value, &[]);
        for name in &self.required {
            if !fields.contains_key(name) {
                causes.push(Cause::required(join(path, name), ""));
            }
        }
        let count = fields.len() as u64;
        let should = |what: String| Cause::invalid(path, &count.into(), &format!("{path} in body {what}"));
        if let Some(min) = self.min_properties.filter(|min| count < *min) {
            causes.push(should(format!("should have at least {min} properties")));
        }
        if let Some(max) = self.max_properties.filter(|max| count > *max) {
            causes.push(Cause {
                reason: "FieldValueTooMany",
                field: path.to_owned(),
                message: format!("Too many: {count}: must have at most {max} items"),
            });
        }
        for (name, child) in fields {
            if let Some(schema) = self.properties.get(name) {
                schema.check(child, &join(path, name), causes);
            } else if let Additional::Of(schema) = &self.additional {
                schema.check(child, &join(path, name), causes);
            }
        }
    }

    fn check_list(&self, entries: &[Value], path: &str, causes: &mut Vec<Cause>) {
        let count = entries.len() as u64;
        if let Some(min) = self.min_items.filter(|min| count < *min) {
            let detail = format!("{path} in body should have at least {min} items");
            causes.push(Cause::invalid(path, &count.into(), &detail));
        }
        if let Some(max) = self.max_items.filter(|max| count > *max) {
            causes.push(Cause {
                reason: "FieldValueTooMany",
                field: path.to_owned(),
                message: format!("Too many: {count}: must have at most {max} items"),
            });
        }
        let mut seen = BTreeSet::new();
        for (i, entry) in entries.iter().enumerate() {
            let here = format!("{path}[{i}]");
            let identity = match &self.list_type {
                ListType::Map(keys) => {
                    let pairs = keys
                        .iter()
                        .map(|k| (k.clone(), entry.get(k).cloned().unwrap_or_default()));
                    Some(Value::Object(pairs.collect()))
                }
                ListType::Set => Some(entry.clone()),
                ListType::Atomic => self.unique_items.then(|| entry.clone()),
            };
            if let Some(identity) = identity
                && !seen.insert(identity.to_string())
            {
                causes.push(Cause::duplicate(here.as_str(), &identity));
            }
            if let Some(items) = &self.items {
                items.check(entry, &here, causes);
            }
        }
    }

    fn check_string(&self, value: &Value, text: &str, path: &str, causes: &mut Vec<Cause>) {
        let length = text.chars().count() as u64;
        if let Some(min) = self.min_length.filter(|min| length < *min) {
            causes.push(Cause::invalid(
                path,
                value,
                &format!("{path} in body should be at least {min} chars long"),
            ));
        }
        if let Some(max) = self.max_length.filter(|max| length > *max) {
            causes.push(Cause {
                reason: "FieldValueTooLong",
                field: path.to_owned(),
                message: format!("Too long: may not be more than {max} bytes"),
            });
        }
        if let Some(pattern) = self.pattern.as_ref().filter(|p| !p.is_match(text)) {
            causes.push(Cause::invalid(
                path,
                value,
                &format!("{path} in body should match '{pattern}'"),
            ));
        }
        let format_ok = match self.format.as_deref() {
            Some("date-time") => text.parse::<jiff::Timestamp>().is_ok(),
            Some("date") => text.parse::<jiff::civil::Date>().is_ok(),
            Some("uuid") => uuid::Uuid::try_parse(text).is_ok(),
            Some("ipv4") => text.parse::<std::net::Ipv4Addr>().is_ok(),
            Some("ipv6") => text.parse::<std::net::Ipv6Addr>().is_ok(),
            _ => true,
        };
        if !format_ok {
            let format = self.format.as_deref().unwrap_or_default();
            causes.push(Cause::invalid(
                path,
                value,
                &format!("{path} in body must be of type {format}: {value}"),
            ));
        }
    }

    fn check_number(&self, value: &Value, number: f64, path: &str, causes: &mut Vec<Cause>) {
        let mut bad = |what: String| causes.push(Cause::invalid(path, value, &format!("{path} in body {what}")));
        match self.minimum {
            Some((min, true)) if number <= min => bad(format!("should be greater than {min}")),
            Some((min, false)) if number < min => bad(format!("should be greater than or equal to {min}")),
            _ => {}
        }
        match self.maximum {
            Some((max, true)) if number >= max => bad(format!("should be less than {max}")),
            Some((max, false)) if number > max => bad(format!("should be less than or equal to {max}")),
            _ => {}
        }
        if let Some(step) = self.multiple_of.filter(|step| *step > 0.0 && number % *step != 0.0) {
            bad(format!("should be a multiple of {step}"));
        }
        let range = match self.format.as_deref() {
            Some("int32") => value.as_i64().is_some_and(|v| i32::try_from(v).is_ok()),
            Some("int64") => value.as_i64().is_some(),
            _ => true,
        };
        if !range {
            bad(format!(
                "must be of type {}: {value}",
                self.format.as_deref().unwrap_or_default()
            ));
        }
    }

    fn check_combinations(&self, value: &Value, path: &str, causes: &mut Vec<Cause>) {
        for schema in &self.all_of {
            schema.check(value, path, causes);
        }
        let mut bad = |what: &str| {
            causes.push(Cause::invalid(
                path,
                &Value::String(String::new()),
                &format!("{path} in body {what}"),
            ));
        };
        if !self.any_of.is_empty() && !self.any_of.iter().any(|s| s.accepts(value)) {
            bad("must validate at least one schema (anyOf)");
        }
        if !self.one_of.is_empty() && self.one_of.iter().filter(|s| s.accepts(value)).count() != 1 {
            bad("must validate one and only one schema (oneOf)");
        }
        if self.not.as_ref().is_some_and(|s| s.accepts(value)) {
            bad("must not validate the schema (not)");
        }
    }
}
