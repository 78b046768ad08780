//! Clusters as Ganeti's tools write them: the text of `hbal -t` (and `-S`), and of
//! `hbal -U`. Sections are separated by one empty line each: groups, nodes,
//! instances, tags, policies; fields by `|`. Described in `man htools`.
//!
//! Of a node count its total memory less what it uses itself, its cores less its own
//! virtual CPUs, and its CPU speed; one that is offline, or of which something is
//! unknown (`?`), is not there. Of an instance count its memory, its status, its
//! primary node, whether it may be balanced, and its virtual CPUs, which are its
//! demand times what `-U` says of its CPU (1 without). Secondary nodes, disks,
//! spindles, networks, tags and policies have no counterpart here and are left aside.

use crate::bad_input::{self, BadInput, hint};
use keel_balance::load::{Capacity, SPEED_RANGE};
use std::collections::HashMap;
use std::path::Path;

/// Disk bandwidth of a node, which the format lacks, in bytes per second.
const IO_BYTES_PER_S: f64 = 500e6;
/// States of running instances in Ganeti.
const RUNNING: [&str; 3] = ["running", "ADMIN_up", "ERROR_up"];
const STANDING: [&str; 7] = [
    "ADMIN_down",
    "ADMIN_offline",
    "ERROR_down",
    "ERROR_nodedown",
    "ERROR_nodeoffline",
    "ERROR_wrongnode",
    "USER_down",
];

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub name: String,
    pub capacity: Capacity,
    /// Whether it is online.
    pub online: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    pub name: String,
    /// Index of its primary node.
    pub node: usize,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Demand, in cores.
    pub cores: f64,
    /// Whether it runs.
    pub runs: bool,
    /// Whether it may be moved.
    pub balanced: bool,
}

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub instances: Vec<Instance>,
}

/// Reads a cluster, and the utilisation of its instances if a file is given.
///
/// # Errors
/// The file, line and reason of an error.
pub fn read(cluster: &Path, utilisation: Option<&Path>) -> Result<Cluster, BadInput> {
    let text = bad_input::read(cluster)?;
    let mut read = parse(cluster, &text)?;
    if let Some(path) = utilisation {
        apply_utilisation(&mut read, path, &bad_input::read(path)?)?;
    }
    Ok(read)
}

fn parse(path: &Path, text: &str) -> Result<Cluster, BadInput> {
    let lines: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line))
        .collect();
    let sections: Vec<&[(usize, &str)]> = lines.split(|(_, line)| line.is_empty()).collect();
    // A file may end with empty lines beyond those that separate.
    if sections.len() < 4 {
        let reason = format!(
            "{} sections instead of groups, nodes, instances, tags and policies, with one empty \
             line between each (`hbal -S` writes them)",
            sections.len()
        );
        return Err(BadInput::file(path, reason));
    }
    let groups: Vec<&str> = sections[0]
        .iter()
        .filter_map(|(_, line)| line.split('|').nth(1))
        .collect();
    let mut cluster = Cluster::default();
    let mut numbers: HashMap<&str, usize> = HashMap::new();
    for &(number, line) in sections[1] {
        let node = node(line, &groups).map_err(|it| BadInput::line(path, number, it))?;
        let name = line.split('|').next().unwrap_or_default();
        if numbers.insert(name, cluster.nodes.len()).is_some() {
            let reason = format!("there are two nodes {name:?}");
            return Err(BadInput::line(path, number, reason));
        }
        cluster.nodes.push(node);
    }
    if cluster.nodes.is_empty() {
        return Err(BadInput::file(path, "it has no nodes (the second section)"));
    }
    let mut names: std::collections::HashSet<&str> = std::collections::HashSet::new();
    for &(number, line) in sections[2] {
        let bad = |reason: String| BadInput::line(path, number, reason);
        let mut instance = instance(line, &numbers).map_err(bad)?;
        if !names.insert(line.split('|').next().unwrap_or_default()) {
            return Err(bad(format!("there are two instances {:?}", instance.name)));
        }
        instance.runs &= cluster.nodes[instance.node].online;
        cluster.instances.push(instance);
    }
    Ok(cluster)
}

fn number(fields: &[&str], at: usize, what: &str) -> Result<f64, String> {
    let field = fields.get(at).copied().unwrap_or_default();
    let number: Option<f64> = field.parse().ok();
    number
        .filter(|number| (0.0..=1e12).contains(number))
        .ok_or_else(|| format!("{what} of {:?} is {field:?}, not a number", fields[0]))
}

fn mebibytes(number: f64) -> u64 {
    (number * f64::from(1 << 20)) as u64
}

fn node(line: &str, groups: &[&str]) -> Result<Node, String> {
    let fields: Vec<&str> = line.split('|').collect();
    if fields.len() < 9 {
        return Err(format!(
            "a node has 9 to 15 fields (name|memory|used|free|disk|free disk|cores|role|group|...), \
             here are {}",
            fields.len()
        ));
    }
    if !groups.contains(&fields[8]) {
        return Err(format!(
            "node {:?} is of group {:?}, which the first section does not have",
            fields[0], fields[8]
        ));
    }
    let mut node = Node {
        name: fields[0].to_owned(),
        capacity: Capacity {
            cores: 1.0,
            speed: 1.0,
            memory_bytes: 0,
            io_bytes_per_s: IO_BYTES_PER_S,
        },
        online: false,
    };
    match fields[7] {
        "Y" => return Ok(node),
        "N" | "M" => {}
        other => {
            return Err(format!(
                "the role of {:?} is {other:?}, not Y (offline), N or M",
                fields[0]
            ));
        }
    }
    if fields[1..7].contains(&"?") {
        return Ok(node);
    }
    let (total, used) = (
        number(&fields, 1, "memory")?,
        number(&fields, 2, "used memory")?,
    );
    let own = if fields.len() > 13 {
        number(&fields, 13, "own CPUs")?
    } else {
        0.0
    };
    node.capacity.cores = number(&fields, 6, "cores")? - own;
    if node.capacity.cores <= 0.0 {
        return Err(format!("{:?} has no cores for instances", fields[0]));
    }
    if fields.len() > 14 {
        node.capacity.speed = number(&fields, 14, "CPU speed")?;
    }
    let (slowest, fastest) = SPEED_RANGE;
    if !(slowest..=fastest).contains(&node.capacity.speed) {
        return Err(format!(
            "CPU speed of {:?} is {}; {slowest} to {fastest} are possible",
            fields[0], node.capacity.speed
        ));
    }
    node.capacity.memory_bytes = mebibytes((total - used).max(0.0));
    node.online = true;
    Ok(node)
}

fn instance(line: &str, nodes: &HashMap<&str, usize>) -> Result<Instance, String> {
    let fields: Vec<&str> = line.split('|').collect();
    if fields.len() < 9 {
        return Err(format!(
            "an instance has 9 to 13 fields (name|memory|disk|CPUs|status|auto balance|primary|\
             secondary|disks|...), here are {}",
            fields.len()
        ));
    }
    let node = *nodes.get(fields[6]).ok_or_else(|| {
        let hint = hint(fields[6], nodes.keys().copied());
        format!(
            "instance {:?} is on {:?}, which is no node; {hint}",
            fields[0], fields[6]
        )
    })?;
    let runs = RUNNING.contains(&fields[4]);
    if !runs && !STANDING.contains(&fields[4]) {
        let states = RUNNING.iter().chain(&STANDING).copied();
        let hint = hint(fields[4], states);
        return Err(format!(
            "the status of {:?} is {:?}; {hint}",
            fields[0], fields[4]
        ));
    }
    let balanced = match fields[5] {
        "Y" => true,
        "N" => false,
        other => {
            return Err(format!(
                "auto balance of {:?} is {other:?}, not Y or N",
                fields[0]
            ));
        }
    };
    Ok(Instance {
        name: fields[0].to_owned(),
        node,
        memory_bytes: mebibytes(number(&fields, 1, "memory")?),
        cores: number(&fields, 3, "CPUs")?,
        runs,
        balanced,
    })
}

/// Multiplies demands by the recorded CPU utilisation.
fn apply_utilisation(cluster: &mut Cluster, path: &Path, text: &str) -> Result<(), BadInput> {
    let numbers: HashMap<String, usize> = cluster
        .instances
        .iter()
        .enumerate()
        .map(|(number, it)| (it.name.clone(), number))
        .collect();
    for (number, line) in text.lines().enumerate() {
        let bad = |reason: String| BadInput::line(path, number + 1, reason);
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields.is_empty() {
            continue;
        }
        if fields.len() != 5 {
            let reason = format!(
                "{} fields instead of 5 (instance, CPU, memory, disk, network)",
                fields.len()
            );
            return Err(bad(reason));
        }
        let Some(&instance) = numbers.get(fields[0]) else {
            let hint = hint(fields[0], numbers.keys().map(String::as_str));
            return Err(bad(format!("there is no instance {:?}; {hint}", fields[0])));
        };
        let what = ["", "CPU", "memory", "disk", "network"];
        let mut share = 1.0;
        for (at, what) in what.iter().enumerate().skip(1).rev() {
            share = self::number(&fields, at, what).map_err(bad)?;
        }
        cluster.instances[instance].cores *= share;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: &str = "\
g1|uuid-1|preferred||

a|1600|100|1400|100000|96000|8|M|uuid-1|8||N|8|1|1.0
b|1600|0|1400|100000|96000|8|N|uuid-1|8||N|8|1|3.0
c|?|?|?|?|?|?|N|uuid-1
d|1600|0|1400|100000|96000|8|Y|uuid-1

i1|100|1000|4|running|Y|a|b|drbd|
i2|200|1000|2|ADMIN_down|N|b|a|drbd||1
i3|100|1000|1|running|Y|d||plain|

";

    fn bad(text: &str) -> String {
        parse(Path::new("c.data"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_cluster_of_hbal() {
        let cluster = parse(Path::new("c.data"), CLUSTER).unwrap();
        let a = &cluster.nodes[0];
        assert_eq!(
            (a.capacity.cores, a.capacity.memory_bytes),
            (7.0, 1500 << 20)
        );
        assert_eq!(cluster.nodes[1].capacity.speed, 3.0);
        let online: Vec<bool> = cluster.nodes.iter().map(|it| it.online).collect();
        assert_eq!(online, [true, true, false, false]);
        let runs: Vec<bool> = cluster.instances.iter().map(|it| it.runs).collect();
        assert_eq!(runs, [true, false, false]);
        assert!(cluster.instances[0].balanced && !cluster.instances[1].balanced);
        let mut used = cluster.clone();
        apply_utilisation(&mut used, Path::new("u"), "i1 0.25 1 1 1\n\ni2 0.5 0 0 0\n").unwrap();
        assert_eq!(used.instances[0].cores, 1.0);
        assert_eq!(used.instances[1].cores, 1.0);
        assert_eq!(used.instances[2], cluster.instances[2]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        assert!(bad("g|u|preferred|\n").starts_with("c.data: 1 sections instead of"));
        for (from, to, says) in [
            ("|M|", "|X|", "line 3: the role of \"a\" is \"X\""),
            (
                "a|1600",
                "a|lots",
                "line 3: memory of \"a\" is \"lots\", not",
            ),
            ("a|1600", "a|NaN", "line 3: memory of \"a\" is \"NaN\", not"),
            ("|1.0\n", "|9.5\n", "line 3: CPU speed of \"a\" is 9.5"),
            (
                "|8||N|8|1|1.0",
                "|8||N|8|8|1.0",
                "line 3: \"a\" has no cores",
            ),
            ("b|1600", "a|1600", "line 4: there are two nodes \"a\""),
            (
                "|N|uuid-1|8",
                "|N|uuid-2|8",
                "line 4: node \"b\" is of group",
            ),
            (
                "d|1600|0|1400|100000|96000|8|Y|uuid-1",
                "d|1",
                "line 6: a node has 9",
            ),
            ("|running|Y|a|", "|runing|Y|a|", "did you mean \"running\"?"),
            (
                "|running|Y|a|",
                "|running|y|a|",
                "line 8: auto balance of \"i1\"",
            ),
            (
                "|running|Y|a|",
                "|running|Y|z|",
                "line 8: instance \"i1\" is on \"z\"",
            ),
            ("i2|200", "i1|200", "line 9: there are two instances \"i1\""),
            ("i2|200", "i2|-1", "line 9: memory of \"i2\" is \"-1\""),
            (
                "i3|100|1000|1|running|Y|d||plain|",
                "i3",
                "line 10: an instance has 9",
            ),
        ] {
            assert!(CLUSTER.contains(from), "{from}");
            let error = bad(&CLUSTER.replacen(from, to, 1));
            assert!(error.contains(says), "{from} {to}: {error}");
        }
        let mut cluster = parse(Path::new("c.data"), CLUSTER).unwrap();
        for (text, says) in [
            ("i1 1 1 1\n", "u, line 1: 4 fields instead of 5"),
            (
                "\ni9 1 1 1 1\n",
                "u, line 2: there is no instance \"i9\"; known",
            ),
            ("i1 1 1 x 1\n", "u, line 1: disk of \"i1\" is \"x\""),
            ("i1 -1 1 1 1\n", "u, line 1: CPU of \"i1\" is \"-1\""),
        ] {
            let error = apply_utilisation(&mut cluster, Path::new("u"), text).unwrap_err();
            assert!(error.to_string().starts_with(says), "{text}: {error}");
        }
    }
}
