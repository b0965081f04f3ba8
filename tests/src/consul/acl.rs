//! Policies and tokens.

use serde_json::json;

use super::Consul;
use crate::Result;

/// The rules that a native service of this name needs, and nothing else.
pub fn service_rules(service: &str) -> String {
    format!(
        r#"service "{service}" {{ policy = "write" }}
           service_prefix "" {{ policy = "read" }}
           node_prefix "" {{ policy = "read" }}"#
    )
}

/// The rules of an agent that serves any service.
pub fn agent_rules() -> String {
    r#"service_prefix "" { policy = "write" intentions = "read" }
       node_prefix "" { policy = "read" }
       agent_prefix "" { policy = "read" }"#
        .into()
}

impl Consul {
    /// A token with one policy of these rules. Returns its secret.
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn token(&self, name: &str, rules: &str) -> Result<String> {
        self.put("/v1/acl/policy", &json!({"Name": name, "Rules": rules}))?;
        let token = self.put(
            "/v1/acl/token",
            &json!({"Policies": [{"Name": name}], "Description": name}),
        )?;
        token["SecretID"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| format!("a token without secret: {token}"))
    }

    /// Takes a token's validity, as a rotation does with the old one.
    ///
    /// # Errors
    /// When there is no such token.
    pub fn revoke(&self, secret: &str) -> Result<()> {
        let token = self.get_as(Some(secret), "/v1/acl/token/self")?;
        let accessor = token["AccessorID"].as_str().unwrap_or_default();
        self.delete(&format!("/v1/acl/token/{accessor}"))
    }
}
