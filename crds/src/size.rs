//! Amounts of bytes as users write them: `64Mi`, `10G`, `1073741824`.
//!
//! Invariant: decoding never fails on content, so one bad object cannot stall a watch; [`Size::bytes`] names the fault.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;

/// A Kubernetes quantity of whole bytes, kept as the text that was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Size(String);

/// Why a [`Size`] is not an amount of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an amount of bytes: write a whole number with an optional suffix k, M, G, T, P, Ki, Mi, Gi, Ti or Pi, such as 10Gi"
)]
pub struct SizeError {
    text: String,
}

impl Size {
    /// From a number of bytes, written without suffix where none fits exactly.
    #[must_use]
    pub fn from_bytes(bytes: i64) -> Self {
        const UNITS: [(&str, u32); 5] = [("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
        for (suffix, shift) in UNITS {
            if bytes > 0 && bytes.trailing_zeros() >= shift {
                return Size(format!("{}{suffix}", bytes >> shift));
            }
        }
        Size(bytes.to_string())
    }

    /// The amount (bytes).
    ///
    /// # Errors
    /// When the text is no whole, non-negative number of bytes below 2^63.
    pub fn bytes(&self) -> Result<i64, SizeError> {
        let fault = || SizeError { text: self.0.clone() };
        let digits = self.0.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = self.0.split_at(digits);
        let unit: i64 = match suffix {
            "" => 1,
            "k" => 1000,
            "M" => 1000_i64.pow(2),
            "G" => 1000_i64.pow(3),
            "T" => 1000_i64.pow(4),
            "P" => 1000_i64.pow(5),
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            "Pi" => 1 << 50,
            _ => return Err(fault()),
        };
        let number: i64 = number.parse().map_err(|_| fault())?;
        number.checked_mul(unit).ok_or_else(fault)
    }

    /// The text as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Size {
    fn from(text: &str) -> Self {
        Size(text.to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum IntOrString {
            Int(i64),
            Text(String),
        }
        Ok(match IntOrString::deserialize(deserializer)? {
            IntOrString::Int(number) => Size(number.to_string()),
            IntOrString::Text(text) => Size(text),
        })
    }
}

impl JsonSchema for Size {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "maxLength": 24,
            "pattern": "^[0-9]+(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Size;

    #[test]
    fn sizes_are_read_with_every_suffix_and_refused_with_the_text_that_was_wrong() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64Mi", 64 << 20),
            ("10G", 10_000_000_000),
            ("2Pi", 2 << 50),
        ] {
            assert_eq!(Size::from(text).bytes(), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "1.5Gi", "10 Gi", "1e9", "9999999Pi", "Gi", "10gb"] {
            let message = Size::from(text).bytes().expect_err(text).to_string();
            assert!(message.contains(&format!("{text:?}")), "{message}");
        }
    }

    #[test]
    fn sizes_are_decoded_from_numbers_and_from_text_and_keep_what_was_written() {
        let from_number: Size = serde_json::from_str("1048576").expect("a number");
        assert_eq!(from_number.bytes(), Ok(1 << 20));
        let from_text: Size = serde_json::from_str("\"1024Ki\"").expect("text");
        assert_eq!(serde_json::to_string(&from_text).expect("encodes"), "\"1024Ki\"");
        assert_eq!(Size::from_bytes(3 << 30).as_str(), "3Gi");
        assert_eq!(Size::from_bytes(4097).as_str(), "4097");
    }
}
