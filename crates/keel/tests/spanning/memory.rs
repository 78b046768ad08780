//! Memory of machines that span: larger than a part, in objects, shared by threads.

use super::*;

/// A machine that is larger than the limit of a part gets its parts before its memory: on a
/// restore with named parts, and on a restart.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_larger_than_a_part_begins_on_several() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let kept = folder.path().join("kept").display().to_string();
    let module = guest("writer");
    let mut machine = Guest::new("m", "a", &module, &["48", "20"]);
    machine.restart = Restart::OnFailure;
    run(&bench, &machine).await;
    let lines = async |name: &str| -> Vec<u64> {
        let text = bench.cluster.output("a", name).await.unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    };
    // It continues, and each of its parts has memory within its limit.
    let goes_on = async |name: &str, nodes: &[&str]| {
        let before = lines(name).await.len();
        wait_for("it continues", || async {
            (lines(name).await.len() > before + 3).then_some(())
        })
        .await
        .expect("it continues");
        let numbers = lines(name).await;
        // Its output before the restart stays.
        let rewound = (1..numbers.len()).rfind(|at| numbers[*at] <= numbers[at - 1]);
        let numbers = &numbers[rewound.unwrap_or(0)..];
        let text: String = numbers.iter().map(|it| format!("{it}\n")).collect();
        check_numbered(&text, numbers[0]).expect("none is missing or repeated");
        let parts = bench.parts(name).parts;
        let on: Vec<&str> = parts.iter().map(|part| part.node.as_str()).collect();
        assert_eq!(on.first(), nodes.first());
        assert_eq!(on.len(), nodes.len());
        assert!(nodes.iter().all(|node| on.contains(node)), "{on:?}");
        for part in &parts {
            let memory = part.memory.as_ref().expect("its memory");
            let mib = memory.resident_bytes >> 20;
            assert!((4..=22).contains(&mib), "{mib} MiB on {}", part.node);
        }
    };
    wait_for("lines", || async {
        (lines("m").await.len() > 2).then_some(())
    })
    .await
    .expect("lines");
    bench.does(&["set", "m", "--max-parts", "3", "--part-memory", "20M"]);
    bench.does(&["checkpoint", "m", "--to", &kept]);
    let again = |args: &[&'static str]| -> Vec<String> {
        let of = ["restore", "m", "--from", &kept, "--as", "twin"].map(str::to_owned);
        of.into_iter()
            .chain(args.iter().map(|it| (*it).to_owned()))
            .collect()
    };
    let restore = |args: &[&'static str]| {
        let args = again(args);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        bench.keel(&args)
    };
    // Automatically for its size; and on request.
    for (args, nodes) in [
        (&[][..], &["a", "b", "c"][..]),
        (&["--nodes", "b,c,c"], &["b", "c", "c"]),
        (&["--on", "c", "--nodes", "a,b"], &["c", "a", "b"]),
    ] {
        let (done, text) = restore(args);
        assert!(done, "{text}");
        goes_on("twin", nodes).await;
        bench.does(&["kill", "twin"]);
        bench.does(&["rm", "twin"]);
    }
    // It cannot be on one node, nor on two; but its parts may be on others.
    let (done, text) = restore(&[]);
    assert!(done, "{text}");
    bench.does(&["span", "twin", "--nodes", "b,b,c"]);
    bench.does(&["span", "twin", "--nodes", "b,b"]);
    goes_on("twin", &["a", "b", "b"]).await;
    bench.does(&["kill", "twin"]);
    bench.does(&["rm", "twin"]);
    for (args, why) in [
        (&["--nodes", "x"][..], "no node"),
        (&["--nodes", "a"], "all of it would be on a"),
        (&["--nodes", "b", "--warm"], "--warm"),
    ] {
        let (done, text) = restore(args);
        assert!(!done && text.contains(why), "{text}");
    }
    let limited = ["set", "m", "--cpu", "0.5"];
    bench.fails(&limited, "applies on one node only");
    // While its memory is still being read it cannot be resumed, but it can be stopped.
    let waits = bench
        .cluster
        .failpoint("a", "spanning-start.spans", Some("delay(3000)"));
    waits.await.expect("an order");
    let (done, text) = restore(&["--detach"]);
    assert!(done, "{text}");
    wait_for("it has parts", || async {
        let (_, text) = bench.keel(&["-o", "json", "parts", "twin"]);
        let parts: Vec<keel_api::PartInfo> = serde_json::from_str(&text).ok()?;
        (parts.len() == 3).then_some(())
    })
    .await
    .expect("parts");
    bench.fails(&["unspan", "twin"], "its memory is still to come");
    bench.fails(&["checkpoint", "twin"], "no machine runs here");
    bench.does(&["stop", "twin"]);
    assert_eq!(bench.inspect("twin").await.status, "stopped");
    bench.does(&["rm", "twin"]);
    let done = bench
        .cluster
        .failpoint("a", "spanning-start.spans", None)
        .await;
    done.expect("no order");
    // Its process is lost: it restarts from the checkpoint, on several nodes at once.
    bench.cluster.kill_worker("a", "m").expect("a worker");
    wait_for("it runs again", || async {
        let info = bench.inspect("m").await;
        (info.status == "running" && info.restarts == 1).then_some(())
    })
    .await
    .expect("it runs");
    let spans = bench.parts("m").parts.len();
    assert_eq!(spans, 3);
    goes_on("m", &["a", "b", "c"]).await;
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
}

/// A machine that is larger than the limit of a part moves, part by part and home by home, while
/// it runs and prints; the limit of each part holds throughout.
#[tokio::test(flavor = "multi_thread")]
async fn the_home_of_what_is_larger_than_a_part_moves() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("writer");
    run(&bench, &Guest::new("m", "a", &module, &["48", "20"])).await;
    let lines = async || -> u64 {
        let text = bench.cluster.output("a", "m").await.unwrap_or_default();
        check_numbered(&text, 0).expect("none is missing or repeated")
    };
    let goes_on = async || {
        let before = lines().await;
        wait_for("it continues", || async {
            (lines().await > before + 3).then_some(())
        })
        .await
        .expect("it continues");
    };
    goes_on().await;
    bench.does(&["set", "m", "--max-parts", "4", "--part-memory", "20M"]);
    bench.does(&["span", "m", "--nodes", "b,b,c"]);
    goes_on().await;
    let on = || {
        let parts = bench.parts("m").parts.into_iter();
        let mut nodes: Vec<String> = parts.map(|part| part.node).collect();
        nodes[1..].sort();
        nodes
    };
    for (to, nodes) in [
        ("c", ["c", "a", "b", "b"]),
        ("a", ["a", "b", "b", "c"]),
        ("b", ["b", "a", "b", "c"]),
    ] {
        bench.does(&["move", "m", "--to", to]);
        // All parts know their limit at once, including a new one.
        let keep = || {
            let parts = bench.parts("m").parts.into_iter();
            let keep = parts.map(|part| part.memory.and_then(|it| it.limit_bytes));
            keep.collect::<Vec<Option<u64>>>()
        };
        wait_for("its parts are where they were", || async {
            (on() == nodes && keep() == [Some(20 << 20); 4]).then_some(())
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: {:?}, {:?}", on(), keep()));
        goes_on().await;
        for part in bench.parts("m").parts {
            let mib = part.memory.expect("its memory").resident_bytes >> 20;
            assert!(mib <= 24, "{mib} MiB on {}", part.node);
        }
    }
    // Its home's node is drained, and holds none of its memory any more.
    bench.does(&["drain", "b"]);
    wait_for("nothing of it is there", || async {
        (!on().contains(&"b".to_owned())).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {:?}, {}", on(), bench.does(&["why", "m"])));
    goes_on().await;
    assert_eq!(bench.inspect("m").await.restarts, 0);
    bench.does(&["kill", "m"]);
    bench.no_parts().await;
}

/// Memory moves: it is present at the target only, and returns when it is used.
#[tokio::test(flavor = "multi_thread")]
async fn memory_is_given_to_other_nodes() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let module = guest("writer");
    // 48 MiB, of which it continuously writes and checks a little.
    run(&bench, &Guest::new("m", "a", &module, &["48", "1"])).await;
    bench.does(&["span", "m", "--nodes", "b"]);
    let objects = || -> Vec<ObjectInfo> {
        let text = bench.does(&["-o", "json", "objects", "m"]);
        serde_json::from_str(&text).expect("JSON")
    };
    let on = |node: &str| -> u64 {
        let all = objects();
        let there = all.iter().filter(|object| object.node == node);
        there.map(|object| object.bytes).sum()
    };
    wait_for("its memory is there", || async {
        (on("a") > 48 << 20).then_some(())
    })
    .await
    .expect("memory");
    let largest = objects().into_iter().max_by_key(|object| object.bytes);
    let (_, start, bytes) = object_range(&largest.expect("memory").range).expect("a range");
    assert!(bytes > 40 << 20, "{bytes}");
    let name = object_range_name(0, start, 32 << 20);
    let held = |node: &str| bench.cluster.memory_of(node);
    let before = held("a");
    let said = bench.does(&["move", &format!("m/objects/{name}"), "--to", "b"]);
    assert!(said.contains("32.0"), "{said}");
    // Pages that it writes and checks return one by one.
    let (home, member, there) = (held("a"), held("b"), on("b"));
    assert!(there > 1 << 20, "{there}");
    assert!(member > 1 << 20, "{member}");
    assert!(home < before, "{home} of {before}");
    // The directory is on the node that holds the memory, also for pages that returned.
    wait_for("its directory is there, too", || async {
        let known = objects().into_iter();
        let known = known.filter(|object| object.directory == "b");
        (known.map(|object| object.bytes).sum::<u64>() >= (32 << 20) - (64 << 10)).then_some(())
    })
    .await
    .expect("its directory");
    let said = bench.does(&["shake", "m", "--for", "3s", "--rate", "40", "--seed", "3"]);
    assert!(said.contains("moves of threads"), "{said}");
    bench.does(&["unspan", "m"]);
    bench.no_parts().await;
    // It has checked all of it meanwhile, and continues.
    let output = bench.cluster.output("a", "m").await.expect("output");
    let lines = check_numbered(&output, 0).expect("none missing");
    wait_for("it continues", || async {
        let output = bench.cluster.output("a", "m").await.ok()?;
        (check_numbered(&output, 0).ok()? > lines + 3).then_some(())
    })
    .await
    .expect("it continues");
    assert_eq!(bench.inspect("m").await.status, "running");
    bench.does(&["kill", "m"]);
}

/// A program that names its memory, and the preferences of its threads: both are reported, survive
/// a move and a checkpoint, and named objects move by name.
#[tokio::test(flavor = "multi_thread")]
async fn objects_have_names() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    // 1 MiB each from 1 MiB on; a thread prefers the second.
    let text = r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (import "evenkeel" "object" (func $object (param i32 i32 i32 i32) (result i32)))
        (import "evenkeel" "prefer" (func $prefer (param i32 i32) (result i32)))
        (memory (export "memory") 64 64 shared)
        (data (i32.const 16) "rowscacheno")
        (func $right (param i32 i32)
            (if (i32.ne (local.get 0) (local.get 1)) (then (call $exit (i32.const 3)))))
        (func (export "wasi_thread_start") (param i32 i32)
            (call $right (call $prefer (i32.const 20) (i32.const 5)) (i32.const 0))
            (call $right (call $prefer (i32.const 25) (i32.const 2)) (i32.const 44))
            (loop $on
                (drop (i32.atomic.rmw.add (i32.const 0x200000) (i32.const 1)))
                (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const 5000000)))
                (br $on)))
        (func (export "_start")
            (call $right (call $object (i32.const 16) (i32.const 4)
                (i32.const 0x100000) (i32.const 0x100000)) (i32.const 0))
            (call $right (call $object (i32.const 20) (i32.const 5)
                (i32.const 0x200000) (i32.const 0x100000)) (i32.const 0))
            (call $right (call $object (i32.const 16) (i32.const 4)
                (i32.const 0x300000) (i32.const 0x100001)) (i32.const 21))
            (call $right (call $object (i32.const 16) (i32.const 65)
                (i32.const 0) (i32.const 1)) (i32.const 28))
            (memory.fill (i32.const 0x100000) (i32.const 7) (i32.const 0x200000))
            (drop (call $spawn (i32.const 0)))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;
    let module = wat::parse_str(text).expect("a module");
    run(&bench, &Guest::new("m", "a", &module, &[])).await;
    let nodes_of = |name: &str| -> Vec<(String, u64)> {
        let text = bench.does(&["-o", "json", "objects", "m"]);
        let all: Vec<ObjectInfo> = serde_json::from_str(&text).expect("JSON");
        let named = all
            .into_iter()
            .filter(|it| it.name.as_deref() == Some(name));
        named.map(|it| (it.node, it.bytes >> 10)).collect()
    };
    let likes = || bench.does(&["threads", "m"]).contains("cache");
    wait_for("both have names", || async {
        (nodes_of("rows") == [("a".into(), 1024)] && likes()).then_some(())
    })
    .await
    .expect("all have them");
    bench.does(&["span", "m", "--nodes", "b"]);
    let said = bench.does(&["move", "m/objects/rows", "--to", "b"]);
    assert!(said.contains("1.00 MiB"), "{said}");
    assert_eq!(nodes_of("rows"), [("b".into(), 1024)]);
    assert_eq!(nodes_of("cache").first().map(|it| it.0.as_str()), Some("a"));
    // All of it, by parts; and the largest object only.
    let parts = bench.does(&["-o", "name", "objects", "m", "--summary"]);
    assert_eq!(parts.lines().collect::<Vec<_>>(), ["0", "1"]);
    let text = bench.does(&["-o", "json", "objects", "m", "--by", "bytes", "--top", "1"]);
    let largest: Vec<ObjectInfo> = serde_json::from_str(&text).expect("JSON");
    let (all, largest) = (nodes_of("rows"), largest.first().map(|it| it.bytes >> 10));
    assert!(largest >= all.iter().map(|it| it.1).max(), "{largest:?}");
    bench.fails(&["objects", "m", "--by", "colour"], "waits");
    bench.fails(&["objects", "m", "--summary", "--top", "1"], "--summary");
    bench.fails(&["move", "m/objects/columns", "--to", "b"], "calls nothing");
    bench.fails(&["move", "m/objects/-x", "--to", "b"], "neither a range");
    bench.fails(&["move", "m/objects/rows", "--to", "c"], "no part on");
    // Names move with the machine.
    bench.does(&["unspan", "m"]);
    bench.does(&["move", "m", "--to", "c"]);
    assert_eq!(nodes_of("rows"), [("c".into(), 1024)]);
    let kept = folder.path().join("kept").display().to_string();
    bench.does(&["checkpoint", "m", "--to", &kept]);
    bench.does(&["kill", "m"]);
    bench.does(&["rm", "m"]);
    bench.does(&["restore", "m", "--from", &kept, "--on", "c"]);
    assert_eq!(nodes_of("cache"), [("c".into(), 1024)]);
    assert!(likes());
    bench.does(&["kill", "m"]);
}

/// Two threads on two nodes increment two words in one page, and both one word in another.
#[tokio::test(flavor = "multi_thread")]
async fn pages_that_are_shared_falsely_are_told_apart() {
    let folder = folder();
    let bench = Bench::new(folder.path()).await;
    let text = r#"(module
        (import "wasi" "thread-spawn" (func $spawn (param i32) (result i32)))
        (memory (export "memory") 64 64 shared)
        (func (export "wasi_thread_start") (param $tid i32) (param $arg i32)
            (loop $on
                (drop (i32.atomic.rmw.add
                    (i32.add (i32.const 0x100000) (i32.shl (local.get $arg) (i32.const 11)))
                    (i32.const 1)))
                (drop (i32.atomic.rmw.add (i32.const 0x200000) (i32.const 1)))
                (drop (i32.atomic.rmw.add
                    (i32.add (i32.const 0x300000) (i32.shl (local.get $arg) (i32.const 12)))
                    (i32.const 1)))
                (br $on)))
        (func (export "_start")
            (drop (call $spawn (i32.const 0)))
            (drop (call $spawn (i32.const 1)))
            (drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))))"#;
    let module = wat::parse_str(text).expect("a module");
    run(&bench, &Guest::new("m", "a", &module, &[])).await;
    let objects = || -> Vec<ObjectInfo> {
        let text = bench.does(&["-o", "json", "objects", "m"]);
        serde_json::from_str(&text).expect("JSON")
    };
    // On one node there are no waits.
    let alone = objects();
    assert!(alone.iter().all(|it| (it.waits, it.shared_pages) == (0, 0)));
    bench.does(&["span", "m", "--nodes", "b"]);
    bench.does(&["move", "m/thread/2", "--to", "b"]);
    // One page each: the number of shared and of falsely shared ones.
    let told = |at: u64| {
        let object = objects().into_iter().find(|it| {
            let range = object_range(&it.range).expect("a range");
            range.0 == 0 && (range.1..range.1 + range.2).contains(&at)
        });
        let object = object.expect("it is somewhere");
        let is_waited_for = object.waits > 20;
        (
            is_waited_for,
            object.shared_pages,
            object.falsely_shared_pages,
        )
    };
    let said = || bench.does(&["objects", "m"]);
    wait_for("they are told apart", || async {
        let all = [0x10_0000, 0x20_0000, 0x30_0000, 0x30_1000].map(told);
        let expected = [(true, 1, 1), (true, 1, 0), (false, 0, 0), (false, 0, 0)];
        (all == expected).then_some(())
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {}", said()));
    assert!(said().contains("1, 1 falsely"), "{}", said());
    bench.does(&["kill", "m"]);
}
