//! What a request asks for: path, query and accepted form, parsed once.
//!
//! Invariant: a path means exactly one thing; what cannot be parsed is a 404 or 400, never a guess.

use crate::error::ApiError;
use crate::table::Include;
use std::collections::HashMap;

/// What a path means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/version`
    Version,
    /// `/healthz`, `/livez`, `/readyz`
    Health,
    /// `/api`
    CoreVersions,
    /// `/apis`
    Groups,
    /// `/apis/<group>`
    Group(String),
    /// `/api/v1`, `/apis/<group>/<version>`
    Resources {
        /// Group, empty for core.
        group: String,
        /// Version.
        version: String,
    },
    /// `/openapi/v2`
    OpenApiV2,
    /// `/openapi/v3`
    OpenApiV3,
    /// `/openapi/v3/<path>`
    OpenApiV3Of(String),
    /// Objects.
    Objects(Target),
}

/// Which objects a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Group, empty for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Plural resource name.
    pub plural: String,
    /// Namespace, if the path has one.
    pub namespace: Option<String>,
    /// Object name, if the path has one.
    pub name: Option<String>,
    /// Subresource, if the path has one.
    pub subresource: Option<String>,
}

/// Splits `/via/<client>/…`, by which tests tell clients apart, from the path proper.
#[must_use]
pub(super) fn client_of(path: &str) -> (Option<&str>, &str) {
    let Some(rest) = path.strip_prefix("/via/") else {
        return (None, path);
    };
    match rest.find('/') {
        Some(at) => (Some(&rest[..at]), &rest[at..]),
        None => (Some(rest), "/"),
    }
}

impl Route {
    /// Parses a path.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        match parts.as_slice() {
            ["version"] => Some(Self::Version),
            ["healthz" | "livez" | "readyz", ..] => Some(Self::Health),
            ["api"] => Some(Self::CoreVersions),
            ["apis"] => Some(Self::Groups),
            ["apis", group] => Some(Self::Group((*group).into())),
            ["api", version] => Some(Self::Resources {
                group: String::new(),
                version: (*version).into(),
            }),
            ["apis", group, version] => Some(Self::Resources {
                group: (*group).into(),
                version: (*version).into(),
            }),
            ["openapi", "v2"] => Some(Self::OpenApiV2),
            ["openapi", "v3"] => Some(Self::OpenApiV3),
            ["openapi", "v3", rest @ ..] => Some(Self::OpenApiV3Of(rest.join("/"))),
            ["api", version, rest @ ..] => Target::parse("", version, rest).map(Self::Objects),
            ["apis", group, version, rest @ ..] => Target::parse(group, version, rest).map(Self::Objects),
            _ => None,
        }
    }
}

impl Target {
    fn parse(group: &str, version: &str, rest: &[&str]) -> Option<Self> {
        let is_own = |sub: &str| matches!(sub, "status" | "finalize");
        let (namespace, plural, name, subresource) = match rest {
            // A namespace is itself an object.
            ["namespaces", name, sub] if is_own(sub) => (None, "namespaces", Some(*name), Some(*sub)),
            ["namespaces", name] => (None, "namespaces", Some(*name), None),
            ["namespaces", ns, plural] => (Some(*ns), *plural, None, None),
            ["namespaces", ns, plural, name] => (Some(*ns), *plural, Some(*name), None),
            ["namespaces", ns, plural, name, sub] => (Some(*ns), *plural, Some(*name), Some(*sub)),
            [plural] => (None, *plural, None, None),
            [plural, name] => (None, *plural, Some(*name), None),
            [plural, name, sub] => (None, *plural, Some(*name), Some(*sub)),
            _ => return None,
        };
        let own = |text: Option<&str>| text.map(ToOwned::to_owned);
        Some(Self {
            group: group.into(),
            version: version.into(),
            plural: plural.into(),
            namespace: own(namespace),
            name: own(name),
            subresource: own(subresource),
        })
    }
}

/// Query parameters.
#[derive(Clone, Debug, Default)]
pub struct Query(pub HashMap<String, String>);

impl Query {
    /// A parameter, empty if absent.
    #[must_use]
    pub fn text(&self, name: &str) -> &str {
        self.0.get(name).map(String::as_str).unwrap_or_default()
    }

    /// A boolean parameter: `1` and `true` (any case) are true.
    #[must_use]
    pub fn flag(&self, name: &str) -> bool {
        matches!(self.text(name).to_ascii_lowercase().as_str(), "1" | "true" | "t")
    }

    /// A number.
    ///
    /// # Errors
    /// 400 if the parameter is there and no number.
    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        match self.text(name) {
            "" => Ok(None),
            text => match text.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(ApiError::bad_request(format!(
                    "invalid value for {name}: {text:?} is no number"
                ))),
            },
        }
    }

    /// Whether `dryRun=All` was given.
    ///
    /// # Errors
    /// 400 for any other value.
    pub fn dry_run(&self) -> Result<bool, ApiError> {
        match self.text("dryRun") {
            "" => Ok(false),
            "All" => Ok(true),
            other => Err(ApiError::bad_request(format!(
                "dryRun: Unsupported value: {other:?}: supported values: \"All\""
            ))),
        }
    }
}

/// The form a client wants objects in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As they are.
    Object,
    /// As a table.
    Table(Include),
    /// Metadata only.
    Partial,
}

/// What a client accepts, resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accept {
    /// Form of objects.
    pub form: Form,
    /// Whether YAML is wanted instead of JSON.
    pub yaml: bool,
    /// Whether aggregated discovery is wanted.
    pub aggregated: bool,
}

impl Accept {
    /// Takes the first range of an Accept header that can be served.
    ///
    /// # Errors
    /// 406 if there is none.
    pub fn parse(header: &str, query: &Query) -> Result<Self, ApiError> {
        let include = match query.text("includeObject") {
            "Object" => Include::Object,
            "None" => Include::Nothing,
            _ => Include::Metadata,
        };
        let header = if header.trim().is_empty() { "*/*" } else { header };
        for range in header.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let parameters: HashMap<&str, &str> = parts.filter_map(|p| p.split_once('=')).collect();
            let yaml = match media {
                "application/json" | "*/*" | "application/*" => false,
                "application/yaml" => true,
                _ => continue,
            };
            let of_meta = parameters.get("g") == Some(&"meta.k8s.io") && parameters.get("v") == Some(&"v1");
            let form = match parameters.get("as") {
                None => Form::Object,
                Some(&"Table") if of_meta => Form::Table(include),
                Some(&("PartialObjectMetadata" | "PartialObjectMetadataList")) if of_meta => Form::Partial,
                Some(&"APIGroupDiscoveryList") if parameters.get("v") == Some(&"v2") => {
                    return Ok(Self {
                        form: Form::Object,
                        yaml,
                        aggregated: true,
                    });
                }
                Some(_) => continue,
            };
            return Ok(Self {
                form,
                yaml,
                aggregated: false,
            });
        }
        Err(ApiError::not_acceptable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_mean_one_thing_each() {
        let target = |path: &str| match Route::parse(path) {
            Some(Route::Objects(t)) => (t.group, t.plural, t.namespace, t.name, t.subresource),
            other => panic!("{path}: {other:?}"),
        };
        let s = |text: &str| Some(text.to_owned());
        assert_eq!(
            target("/api/v1/namespaces/a"),
            (String::new(), "namespaces".into(), None, s("a"), None)
        );
        assert_eq!(target("/api/v1/namespaces/a/status").4, s("status"));
        assert_eq!(target("/api/v1/namespaces/a/events").1, "events");
        assert_eq!(
            target("/apis/g/v1/ws/n/status"),
            ("g".into(), "ws".into(), None, s("n"), s("status"))
        );
        assert_eq!(Route::parse("/nonsense"), None);
        assert_eq!(client_of("/via/op1/api/v1"), (Some("op1"), "/api/v1"));
    }

    #[test]
    fn the_first_acceptable_form_wins() {
        let query = Query::default();
        let form = |header: &str| Accept::parse(header, &query).map(|a| a.form);
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(form(kubectl), Ok(Form::Table(Include::Metadata)));
        assert_eq!(
            form("application/vnd.kubernetes.protobuf,application/json"),
            Ok(Form::Object)
        );
        assert_eq!(form(""), Ok(Form::Object));
        assert!(form("application/vnd.kubernetes.protobuf").is_err());
    }
}
