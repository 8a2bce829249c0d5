//! JSON in which no object says the same thing twice (RFC 8259 section 4: what that means is up to who reads it).
//!
//! A [`Value`] takes the last, typed structures refuse it. What goes through a value on its way into a structure is to be refused, too.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Such a document.
pub(super) struct Unambiguous(pub(super) Value);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any).map(Unambiguous)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Unambiguous(value)) = seq.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some((key, Unambiguous(value))) = map.next_entry::<String, _>()? {
            if values.contains_key(&key) {
                return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
            }
            values.insert(key, value);
        }
        Ok(values.into())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_document_is_what_it_says_and_says_nothing_twice() {
        let text = r#"{"a":[1,-2,3.5,null,true,"\u00e9",{"b":{}},{"b":{}}],"b":18446744073709551615}"#;
        let Unambiguous(read) = serde_json::from_str(text).expect("a document");
        assert_eq!(read, json!({"a": [1, -2, 3.5, null, true, "é", {"b": {}}, {"b": {}}], "b": u64::MAX}));
        for text in [r#"{"a":1,"b":2,"a":1}"#, r#"[{"a":{"b":1,"\u0062":2}}]"#] {
            let error = serde_json::from_str::<Unambiguous>(text).map(|_| ()).expect_err(text).to_string();
            assert!(error.starts_with("duplicate field `"), "{error}");
        }
    }
}
