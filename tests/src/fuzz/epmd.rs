use meshx_dist::epmd::{
    Port2Resp, Request, decode_alive2_resp, decode_names_resp, decode_port2_resp, encode_names_resp,
};

use super::stays;

/// EPMD, requests and responses: what was understood is written back to what is understood the same.
pub fn epmd(data: &[u8]) {
    if let Ok(Some(request)) = Request::decode(data) {
        let mut bytes = Vec::new();
        request.encode(&mut bytes).unwrap();
        assert_eq!(Request::decode(&bytes), Ok(Some(request)));
    }
    if let Ok(Some(response)) = decode_alive2_resp(data) {
        let mut bytes = Vec::new();
        response.encode(&mut bytes);
        assert_eq!(bytes, data);
    }
    if let Ok(Some(response)) = decode_port2_resp(data) {
        let mut bytes = Vec::new();
        response.encode(&mut bytes).unwrap();
        assert_eq!(decode_port2_resp(&bytes), Ok(Some(response.clone())));
        if let Port2Resp::Found(node) = response {
            assert!(!node.name.is_empty());
        }
    }
    if let Ok(names) = decode_names_resp(data) {
        let mut bytes = Vec::new();
        let nodes = names.nodes.iter().map(|(name, port)| (name.as_slice(), *port));
        encode_names_resp(names.epmd_port, nodes, &mut bytes).unwrap();
        assert_eq!(decode_names_resp(&bytes), Ok(names));
    }
    stays(data, |bytes| match Request::decode(bytes) {
        // A request may be cut off where another ends: the connection holds one, so bytes behind it are a fault.
        Ok(Some(_)) => Ok(None),
        other => other.map_err(|_| ()),
    });
}
