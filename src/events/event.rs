//! Something that has changed.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

/// From here on, two numbers may be one (2⁵³).
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Something has changed: a row that another program has written, an upload, a price list.
///
/// As JSON: `{"name": "agents", "tenant": "acme", "fields": {"op": "update", "id": ["a1", "a2"]}}`. A field has one value or several,
/// which are texts, numbers or booleans. A number that has more digits than 64 bits hold is to be written as a text.
///
/// ```
/// # use tower_cache_aside::Event;
/// let event = Event::new("agents").tenant("acme").field("op", "update").field("id", "a1").field("id", "a2");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[must_use]
pub struct Event {
    name: String,
    #[serde(default)]
    tenant: Option<String>,
    #[serde(default, deserialize_with = "fields")]
    fields: BTreeMap<String, Vec<String>>,
}

impl Event {
    /// An event of this name, by which policies know it: a table, for instance.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), tenant: None, fields: BTreeMap::new() }
    }

    /// Whose it is.
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// Adds a value to a field.
    pub fn field(mut self, name: impl Into<String>, value: impl ToString) -> Self {
        self.fields.entry(name.into()).or_default().push(value.to_string());
        self
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whose it is, if it says so.
    pub fn tenant_name(&self) -> Option<&str> {
        self.tenant.as_deref()
    }

    /// How many values it has.
    pub(crate) fn size(&self) -> usize {
        self.fields.values().map(Vec::len).sum()
    }

    /// The values of a field; none if there is no such field.
    pub fn values(&self, field: &str) -> &[String] {
        self.fields.get(field).map_or(&[], Vec::as_slice)
    }
}

/// Each field's values as texts: one, or several.
fn fields<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Vec<String>>, D::Error> {
    struct Fields;
    impl<'de> Visitor<'de> for Fields {
        type Value = BTreeMap<String, Vec<String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("fields with texts, numbers or booleans")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut fields = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                let mut values = vec![];
                map.next_value_seed(Values(&mut values, true))?;
                if fields.insert(name, values).is_some() {
                    return Err(de::Error::custom("a field is there twice"));
                }
            }
            Ok(fields)
        }
    }
    deserializer.deserialize_map(Fields)
}

/// Adds one value, or several if that may be.
struct Values<'v>(&'v mut Vec<String>, bool);

impl<'de> DeserializeSeed<'de> for Values<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Values<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, a boolean, or a list of these")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.push(text.to_owned());
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.0.push(value.to_string());
        Ok(())
    }

    fn visit_i64<E>(self, number: i64) -> Result<(), E> {
        self.0.push(number.to_string());
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        self.0.push(number.to_string());
        Ok(())
    }

    /// What is larger has lost digits: it would be another's id.
    fn visit_f64<E: de::Error>(self, number: f64) -> Result<(), E> {
        if number.abs() >= EXACT {
            return Err(E::custom("a number with more digits than are kept; write it as a text"));
        }
        self.0.push(number.to_string());
        Ok(())
    }

    /// As a field that is not there.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Self(values, true) = self else { return Err(de::Error::custom("a list in a list")) };
        while list.next_element_seed(Values(values, false))?.is_some() {}
        Ok(())
    }
}
