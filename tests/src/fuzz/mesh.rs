use std::fmt::Debug;

use meshx::mesh::{ServiceName, SpiffeId, split_node};
use meshx::proxy::wire::{Accept, Connect, ConnectReply, Request, WireError, decode_reply, encode_reply};

use super::agent;

/// The frames before a link's bytes, between agents and on the dist socket; the names in them; and a running agent's
/// dist socket, which is given all of it.
pub fn mesh(data: &[u8]) {
    settles(data, Connect::decode, Connect::encode);
    settles(data, ConnectReply::decode, ConnectReply::encode);
    settles(data, Accept::decode, Accept::encode);
    settles(data, Request::decode, Request::encode);
    settles(data, decode_reply, encode_reply);
    if let Ok(request) = Request::decode(data) {
        name(&request.service);
        name(&request.node);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        name(text);
    }
    agent::dist(data);
}

/// Texts may be cut when they are written, so once written a frame stays the same.
fn settles<T: PartialEq + Debug>(
    data: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, WireError>,
    encode: impl Fn(&T, &mut Vec<u8>),
) {
    let decoded = match decode(data) {
        Ok(decoded) => decoded,
        Err(error) => {
            std::hint::black_box(error.to_string());
            return;
        }
    };
    let (mut first, mut second) = (Vec::new(), Vec::new());
    encode(&decoded, &mut first);
    encode(&decode(&first[2..]).unwrap(), &mut second);
    assert_eq!(first, second);
}

fn name(text: &str) {
    if let Ok(service) = ServiceName::new(text) {
        assert_eq!(service.as_ref(), text);
        assert!(text.len() <= 63);
    }
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string().parse::<SpiffeId>().as_ref(), Ok(&id));
    }
    if let Ok((name, host)) = split_node(text) {
        assert_eq!(format!("{name}@{host}"), text);
        let service = ServiceName::from_node(text).unwrap();
        assert_eq!(ServiceName::new(service.as_ref()), Ok(service));
    }
}
