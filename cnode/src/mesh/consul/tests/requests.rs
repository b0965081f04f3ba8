//! Requests that go wrong, and watches of a Consul that misbehaves.

use std::collections::HashMap;

use super::*;

async fn fault(mock: &Mock, request: Request) -> Fault {
    let asking = tokio::time::timeout(LONG, async { mock.client().send(&request).await });
    match asking.await.expect("an end") {
        Ok(reply) => match reply.json::<HashMap<String, String>>() {
            Err(fault) => fault,
            Ok(seen) => panic!("{seen:?}"),
        },
        Err(fault) => fault,
    }
}

fn question() -> Request {
    Request::get(&["some", "thing"]).right("service:write on \"shop\"")
}

#[tokio::test]
async fn garbage_is_no_answer_and_is_not_shown() {
    for garbage in [
        "s3cret",
        "{\"s3cret\": 1}",
        "[\"s3cret\"]",
        "",
        "{\"a\": \"s3cret\"",
    ] {
        let mock = Mock::new(move |_, _| answer(1, garbage)).await;
        let fault = fault(&mock, question()).await;
        assert!(
            fault.is_away() && !fault.to_string().contains("s3cret"),
            "{fault}"
        );
    }
    let mock = Mock::new(|_, _| Some(([("X-Consul-Index", "-1")], "{}").into_response())).await;
    assert!(fault(&mock, question()).await.is_away());
}

#[tokio::test]
async fn an_answer_has_a_largest_size() {
    for (request, limit) in [(question(), SMALL), (question().large(), LARGE)] {
        let mock = Mock::new(move |uri, _| {
            let more = usize::from(uri.query() == Some("more="));
            answer(1, format!("{{}}{}", " ".repeat(limit - 2 + more)))
        })
        .await;
        let client = mock.client();
        let largest = client.send(&request).await.unwrap();
        assert!(largest.json::<HashMap<String, String>>().unwrap().is_empty());
        let fault = fault(&mock, request.query("more", "")).await;
        assert!(
            fault.is_away() && fault.to_string().contains(&limit.to_string()),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn silence_and_a_trickle_end_in_time() {
    let silent = Mock::new(|_, _| None).await;
    let trickle = Mock::new(|_, _| {
        let drops = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Some((Ok::<_, std::io::Error>(Bytes::from_static(b" ")), ()))
        });
        answer(1, Body::from_stream(drops))
    })
    .await;
    let began = Instant::now();
    let (a, b) = tokio::join!(fault(&silent, question()), fault(&trickle, question()));
    assert!(began.elapsed() < PLAIN_TIME * 3, "{:?}", began.elapsed());
    for fault in [a, b] {
        assert!(
            fault.is_away() && fault.to_string().contains("not done within"),
            "{fault}"
        );
    }
}

#[tokio::test]
async fn what_consul_refuses_is_told_by_kind() {
    let of = async |status, body| {
        let mock = Mock::new(move |_, _| says(status, body)).await;
        fault(&mock, question()).await
    };
    let denied = of(403, "Permission denied").await;
    let text = denied.to_string();
    assert!(
        text.contains("lacks service:write on \"shop\"") && text.contains("no token was given"),
        "{text}"
    );
    assert!(matches!(MeshError::from(denied), MeshError::Forbidden(_)));
    assert!(matches!(of(403, "ACL not found").await, Fault::UnknownToken(_)));
    for (status, body, missing) in [
        (404, "unknown service ID: x", true),
        (500, "Unknown check \"x\"", true),
        (500, "CheckID \"x\" does not have associated TTL", true),
        (500, "Unknown service {\"x\" {}}", true),
        (500, "No cluster leader", false),
    ] {
        assert_eq!(of(status, body).await.is_missing(), missing, "{body}");
    }
    assert!(of(500, "No cluster leader").await.is_away());
    assert!(of(429, "").await.is_away());
    assert!(
        matches!(of(400, "Bad request\n\u{1b}[2J").await.into(), MeshError::Refused(text) if !text.contains('\u{1b}'))
    );
    // Redirects are not followed: the token would go where they lead.
    let mock = Mock::new(|uri, _| {
        assert_eq!(uri.path(), "/v1/some/thing");
        Some((StatusCode::MOVED_PERMANENTLY, [("Location", "/elsewhere")]).into_response())
    })
    .await;
    assert!(matches!(
        fault(&mock, question()).await,
        Fault::Status { code: 301, .. }
    ));
}

#[tokio::test]
async fn names_cannot_leave_their_place_in_the_path() {
    let mock = Mock::new(|_, _| answer(1, "{}")).await;
    let client = mock.client();
    for name in ["a/b", "../x", "a?b=c", "a#b", "100%", "shop@h1", "日本", "a b"] {
        client
            .send(&Request::get(&["agent", "service", name]))
            .await
            .unwrap();
    }
    let asked = mock.asked();
    assert_eq!(
        asked,
        [
            "/v1/agent/service/a%2Fb",
            "/v1/agent/service/..%2Fx",
            "/v1/agent/service/a%3Fb=c",
            "/v1/agent/service/a%23b",
            "/v1/agent/service/100%25",
            "/v1/agent/service/shop@h1",
            "/v1/agent/service/%E6%97%A5%E6%9C%AC",
            "/v1/agent/service/a%20b",
        ]
    );
    for name in ["", ".", ".."] {
        let refused = client.send(&Request::get(&["agent", "service", name])).await;
        assert!(refused.is_err(), "{name:?}");
    }
    assert_eq!(mock.asked().len(), asked.len(), "nothing was sent");
}

#[tokio::test]
async fn a_token_file_is_read_again_when_it_changes() {
    let mock = Mock::new(|_, _| answer(1, "{}")).await;
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("token");
    std::fs::write(&path, "one").unwrap();
    let args = ConsulArgs {
        consul_addr: Some(mock.address.clone()),
        consul_token_file: Some(path.clone()),
        ..ConsulArgs::default()
    };
    let settings = ConsulSettings::read(args, ConsulFile::default(), |_| None).unwrap();
    let client = Client::new(settings).unwrap();
    let ask = async |token: Option<Token>| {
        client.send(&question().token(token)).await.unwrap();
        let asked = mock.asked.lock().unwrap();
        asked.last().unwrap().1.clone().unwrap()
    };
    assert_eq!(ask(None).await, "one");
    let new = temp.path().join("new");
    std::fs::write(&new, "two").unwrap();
    std::fs::rename(&new, &path).unwrap();
    assert_eq!(ask(None).await, "two");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ask(None).await, "two", "the last one is kept");
    assert_eq!(ask(Some(Token::new("own"))).await, "own");
}

#[tokio::test]
async fn an_index_that_goes_backwards_starts_over() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 => answer(10, "1"),
        10 => answer(3, "2"),
        _ => None,
    })
    .await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    tokio::time::timeout(LONG, seen.wait_for(|seen| seen.version >= 3))
        .await
        .unwrap()
        .unwrap();
    let asked = mock.asked();
    let indices: Vec<u64> = asked
        .iter()
        .map(|uri| index_of(&uri.parse().unwrap()))
        .take(3)
        .collect();
    assert_eq!(indices, [0, 10, 0]);
}

#[tokio::test]
async fn an_index_of_zero_counts_as_one_and_a_missing_one_as_no_answer() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 => answer(0, "1"),
        _ => None,
    })
    .await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    tokio::time::timeout(LONG, seen.wait_for(|seen| seen.value == Some(1)))
        .await
        .unwrap()
        .unwrap();
    let held = async {
        while mock.asked().len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, held).await.unwrap();
    assert_eq!(index_of(&mock.asked()[1].parse().unwrap()), 1);

    mock.plays(|_, _| Some("1".into_response()));
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    let seen = tokio::time::timeout(LONG, seen.wait_for(super::watch::Seen::is_known))
        .await
        .unwrap()
        .unwrap();
    assert!(
        seen.fault
            .as_ref()
            .unwrap()
            .to_string()
            .contains("X-Consul-Index")
    );
}

#[tokio::test]
async fn answers_that_come_at_once_without_a_change_are_slowed_down() {
    let mock = Mock::new(|_, _| answer(5, "1")).await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    seen.wait_for(|seen| seen.value.is_some()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    // 200, 400, 800 ms and so on, each between a half and the whole.
    let count = mock.asked().len();
    assert!((2..=8).contains(&count), "{count} requests");
    drop(seen);
    // One that is under way is asked to its end.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let count = mock.asked().len();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(mock.asked().len(), count, "nobody listens");
}

#[tokio::test]
async fn a_watch_keeps_its_answer_while_consul_fails_and_goes_on() {
    let mock = Mock::new(|uri, _| match index_of(uri) {
        0 => answer(5, "1"),
        _ => says(500, "No cluster leader"),
    })
    .await;
    let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
    {
        let seen = tokio::time::timeout(LONG, seen.wait_for(|seen| seen.fault.is_some()))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(seen.value, Some(1));
    }
    mock.plays(|uri, _| match index_of(uri) {
        0 => answer(2, "7"),
        _ => None,
    });
    let seen = tokio::time::timeout(LONG, seen.wait_for(|seen| seen.value == Some(7)))
        .await
        .unwrap()
        .unwrap();
    assert!(seen.fault.is_none());
}

#[tokio::test]
async fn a_consul_that_began_anew_between_two_queries_is_not_waited_for() {
    // Its index is the one before, or lower: what it says now it would tell only when the wait is over.
    for index in [5, 3] {
        let mock = Mock::new(move |uri, _| {
            let short = uri.query().is_some_and(|query| query.contains("wait=1000ms"));
            match index_of(uri) {
                0 => answer(5, "1"),
                5 if short => answer(index, "7"),
                _ => None,
            }
        })
        .await;
        let mut seen = watch(mock.client(), question(), None, None, |reply| reply.json::<u32>());
        tokio::time::timeout(LONG, seen.wait_for(|seen| seen.value == Some(7)))
            .await
            .unwrap()
            .unwrap();
    }
}
