//! Exact bytes, limits, truncations and round trips.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn encoded(request: &Request) -> Vec<u8> {
    let mut out = Vec::new();
    request.encode(&mut out).unwrap();
    out
}

#[test]
fn exact_bytes_of_requests() {
    let shop = Node::new("shop", 0x1234, NodeType::Normal);
    let cases: [(Request, &[u8]); 6] = [
        (
            Request::Alive2(shop),
            b"\x00\x11\x78\x12\x34\x4d\x00\x00\x06\x00\x06\x00\x04shop\x00\x00",
        ),
        (Request::PortPlease2(b"shop".to_vec()), b"\x00\x05zshop"),
        (Request::Names, b"\x00\x01n"),
        (Request::Dump, b"\x00\x01d"),
        (Request::Kill, b"\x00\x01k"),
        (Request::Stop(b"shop".to_vec()), b"\x00\x05sshop"),
    ];
    for (request, bytes) in cases {
        assert_eq!(encoded(&request), bytes);
        assert_eq!(Request::decode(bytes), Ok(Some(request)));
        for end in 0..bytes.len() {
            assert_eq!(Request::decode(&bytes[..end]), Ok(None), "cut at {end}");
        }
        let longer = [bytes, &b"x"[..]].concat();
        assert!(matches!(
            Request::decode(&longer),
            Err(EpmdError::TrailingBytes { len: 1, .. })
        ));
    }
}

#[test]
fn exact_bytes_of_responses() {
    let mut out = Vec::new();
    Alive2Resp::Creation32 {
        result: 0,
        creation: 0x0102_0304,
    }
    .encode(&mut out);
    assert_eq!(out, [118, 0, 1, 2, 3, 4]);
    assert_eq!(
        decode_alive2_resp(&out).unwrap().unwrap().creation(),
        Some(0x0102_0304)
    );
    out.clear();
    Alive2Resp::Creation16 {
        result: 1,
        creation: 99,
    }
    .encode(&mut out);
    assert_eq!(out, [121, 1, 0, 99]);
    assert_eq!(decode_alive2_resp(&out).unwrap().unwrap().creation(), None);
    out.clear();
    Port2Resp::Found(Node::new("b", 7, NodeType::Hidden))
        .encode(&mut out)
        .unwrap();
    assert_eq!(out, b"\x77\x00\x00\x07\x48\x00\x00\x06\x00\x06\x00\x01b\x00\x00");
    out.clear();
    Port2Resp::NotFound(0).encode(&mut out).unwrap();
    assert_eq!(out, [119, 1]);
    assert_eq!(decode_port2_resp(&out), Ok(Some(Port2Resp::NotFound(1))));
    out.clear();
    encode_names_resp(4369, [(&b"a"[..], 5), (&b"b"[..], 65535)], &mut out).unwrap();
    assert_eq!(out, b"\x00\x00\x11\x11name a at port 5\nname b at port 65535\n");
    let nodes = vec![(b"a".to_vec(), 5), (b"b".to_vec(), 65535)];
    assert_eq!(
        decode_names_resp(&out),
        Ok(NamesResp {
            epmd_port: 4369,
            nodes
        })
    );
}

#[test]
fn every_truncation_of_a_response_needs_more_and_a_byte_too_many_is_refused() {
    let mut alive = Vec::new();
    Alive2Resp::Creation32 {
        result: 0,
        creation: 9,
    }
    .encode(&mut alive);
    let mut port = Vec::new();
    let mut node = Node::new("shop", 9, NodeType::Other(3));
    node.extra = b"xy".to_vec();
    Port2Resp::Found(node).encode(&mut port).unwrap();
    for end in 0..alive.len() {
        assert_eq!(decode_alive2_resp(&alive[..end]), Ok(None));
    }
    for end in 0..port.len() {
        assert_eq!(decode_port2_resp(&port[..end]), Ok(None));
    }
    assert!(matches!(decode_port2_resp(&port), Ok(Some(Port2Resp::Found(_)))));
    alive.push(0);
    port.push(0);
    assert!(matches!(
        decode_alive2_resp(&alive),
        Err(EpmdError::TrailingBytes { .. })
    ));
    assert!(matches!(
        decode_port2_resp(&port),
        Err(EpmdError::TrailingBytes { .. })
    ));
}

#[test]
fn lengths_beyond_the_limits_are_refused_from_the_header() {
    let refused = Request::decode(&u16::to_be_bytes(MAX_REQUEST as u16 + 1)).unwrap_err();
    assert_eq!(refused.to_string(), "request of 524 bytes, at most 523 are taken");
    let mut node = Node::new(vec![b'x'; MAX_NAME_LEN], 1, NodeType::Normal);
    node.extra = vec![0; MAX_EXTRA_LEN];
    let full = Request::Alive2(node.clone());
    let bytes = encoded(&full);
    assert_eq!(bytes.len(), MAX_REQUEST + 2);
    assert_eq!(Request::decode(&bytes), Ok(Some(full)));
    node.name.push(b'x');
    assert!(matches!(
        Request::Alive2(node.clone()).encode(&mut Vec::new()),
        Err(EpmdError::TooLong { .. })
    ));
    let long_name = b"\x77\x00\x00\x07\x48\x00\x00\x06\x00\x06\x01\x00";
    let refused = EpmdError::TooLong {
        what: "name",
        len: 256,
        max: 255,
    };
    assert_eq!(decode_port2_resp(long_name), Err(refused));
    let long_extra = b"\x77\x00\x00\x07\x48\x00\x00\x06\x00\x06\x00\x01b\xff\xff";
    assert!(matches!(
        decode_port2_resp(long_extra),
        Err(EpmdError::TooLong {
            what: "extra field",
            ..
        })
    ));
    let long_list = vec![b'n'; MAX_NAMES_RESP + 1];
    assert!(matches!(
        decode_names_resp(&long_list),
        Err(EpmdError::TooLong { .. })
    ));
}

#[test]
fn unknown_tags_are_refused_at_their_first_byte() {
    assert_eq!(
        Request::decode(b"\x00\x09G").unwrap_err().to_string(),
        "got tag 71, wanted an EPMD request"
    );
    assert!(matches!(
        decode_alive2_resp(b"H"),
        Err(EpmdError::UnknownTag { got: b'H', .. })
    ));
    assert!(matches!(
        decode_port2_resp(b"v"),
        Err(EpmdError::UnknownTag { got: b'v', .. })
    ));
    assert!(matches!(
        Request::decode(&[0, 0]),
        Err(EpmdError::CutShort { .. })
    ));
    assert!(matches!(
        Request::decode(b"\x00\x03x\x01\x02"),
        Err(EpmdError::CutShort { .. })
    ));
}

#[test]
fn a_name_cannot_break_a_listing() {
    for bad in [&b""[..], b"a\nname b", b"a b", b"a@h", b"a\0", b"a\x7f"] {
        let request = [&(bad.len() as u16 + 1).to_be_bytes()[..], b"z", bad].concat();
        assert!(
            matches!(Request::decode(&request), Err(EpmdError::BadName { .. })),
            "{bad:?}"
        );
        let mut out = vec![1];
        assert!(encode_names_resp(1, [(&b"ok"[..], 1), (bad, 1)], &mut out).is_err());
        assert_eq!(out, [1]);
    }
    for line in [
        "name a at port 5",
        "name a at port +5\n",
        "name a at port 65536\n",
        "name  at port 5\n",
        "x\n",
        "\n",
    ] {
        let bytes = [&[0; 4], line.as_bytes()].concat();
        assert!(
            matches!(decode_names_resp(&bytes), Err(EpmdError::BadLine { .. })),
            "{line:?}"
        );
    }
    assert!(matches!(
        decode_names_resp(&[0; 3]),
        Err(EpmdError::CutShort { .. })
    ));
}

proptest! {
    #[test]
    fn nodes_go_round(
        name in "[a-z\u{e4}_-]{1,60}",
        extra in prop::collection::vec(any::<u8>(), 0..MAX_EXTRA_LEN),
        port: u16, kind: u8, protocol: u8, highest_version: u16, lowest_version: u16,
    ) {
        let name = name.into_bytes();
        let node_type = NodeType::from_byte(kind);
        let node = Node { port, node_type, protocol, highest_version, lowest_version, name, extra };
        let request = Request::Alive2(node.clone());
        prop_assert_eq!(Request::decode(&encoded(&request)), Ok(Some(request)));
        let response = Port2Resp::Found(node);
        let mut out = Vec::new();
        response.encode(&mut out).unwrap();
        prop_assert_eq!(decode_port2_resp(&out), Ok(Some(response)));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..100), tag in 100u8..125) {
        let small = [&[0, bytes.len() as u8 + 1, tag][..], &bytes].concat();
        for bytes in [&bytes[..], &small, &small[2..]] {
            let _ = Request::decode(bytes);
            let _ = decode_alive2_resp(bytes);
            let _ = decode_port2_resp(bytes);
            let _ = decode_names_resp(bytes);
        }
    }
}
