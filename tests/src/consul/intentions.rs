//! Who may talk to whom, changed as an operator does by the API.

use serde_json::{Value, json};

use super::Consul;
use crate::Result;

impl Consul {
    /// Creates or changes the intention from `source` to `destination` (`*`: any service).
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn intention(&self, source: &str, destination: &str, action: &str) -> Result<()> {
        // Until 1.8 an intention has an id; from 1.9 its pair of names is one.
        if super::version()? >= (1, 9) {
            let path = format!("/v1/connect/intentions/exact?source={source}&destination={destination}");
            return self.put(&path, &json!({"Action": action})).map(|_| ());
        }
        let body = json!({
            "SourceName": source, "DestinationName": destination, "SourceType": "consul", "Action": action,
        });
        match self.intention_id(source, destination)? {
            Some(id) => self.put(&format!("/v1/connect/intentions/{id}"), &body)?,
            None => self.post("/v1/connect/intentions", &body)?,
        };
        Ok(())
    }

    /// `source` may not talk to `destination` from now on.
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn deny(&self, source: &str, destination: &str) -> Result<()> {
        self.intention(source, destination, "deny")
    }

    /// `source` may talk to `destination` from now on.
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn allow(&self, source: &str, destination: &str) -> Result<()> {
        self.intention(source, destination, "allow")
    }

    /// Deletes the intention: the default holds again.
    ///
    /// # Errors
    /// When Consul refuses it.
    pub fn forget_intention(&self, source: &str, destination: &str) -> Result<()> {
        if super::version()? >= (1, 9) {
            return self.delete(&format!(
                "/v1/connect/intentions/exact?source={source}&destination={destination}"
            ));
        }
        match self.intention_id(source, destination)? {
            Some(id) => self.delete(&format!("/v1/connect/intentions/{id}")),
            None => Ok(()),
        }
    }

    fn intention_id(&self, source: &str, destination: &str) -> Result<Option<String>> {
        let all = self.get("/v1/connect/intentions")?;
        let fits = |it: &&Value| it["SourceName"] == source && it["DestinationName"] == destination;
        let found = all.as_array().into_iter().flatten().find(fits);
        Ok(found.and_then(|it| Some(it["ID"].as_str()?.to_owned())))
    }
}
