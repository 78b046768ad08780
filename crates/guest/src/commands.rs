//! The commands of the protocol, as answers to lines: `{"execute": NAME, "arguments": {…}}` is
//! answered by `{"return": …}` or `{"error": {"class": …, "desc": …}}`.

use crate::failure::Failure;
use crate::processes::{Processes, Start};
use crate::requests::{DELIMITER, Requests};
use crate::{clock, power, system};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Carries out a command; `None` if it is not answered.
type Command = fn(&mut Agent, Value) -> Result<Option<Value>, Failure>;

/// All commands, by their names.
const COMMANDS: &[(&str, Command)] = &[
    ("guest-exec", |agent, arguments| {
        let start: Start = decode(arguments)?;
        let number = agent.processes.start(start)?;
        Ok(Some(json!({ "pid": number })))
    }),
    ("guest-exec-status", |agent, arguments| {
        let Number { pid } = decode(arguments)?;
        Ok(Some(agent.processes.status(pid)?))
    }),
    ("guest-get-fsinfo", |_, _| system::file_systems().map(Some)),
    ("guest-get-host-name", |_, _| system::host_name().map(Some)),
    ("guest-get-load", |_, _| system::load().map(Some)),
    ("guest-get-osinfo", |_, _| system::system().map(Some)),
    ("guest-get-time", |_, _| clock::time().map(Some)),
    ("guest-info", |_, _| Ok(Some(info()))),
    ("guest-network-get-interfaces", |_, _| {
        system::interfaces().map(Some)
    }),
    ("guest-ping", |_, _| Ok(Some(json!({})))),
    ("guest-set-time", |_, arguments| {
        let NewTime { time } = decode(arguments)?;
        clock::set(time)?;
        Ok(Some(json!({})))
    }),
    (SHUTDOWN, |_, arguments| {
        let Shutdown { mode } = decode(arguments)?;
        power::end(mode.as_deref().unwrap_or(power::POWER_DOWN))?;
        Ok(None)
    }),
    ("guest-sync", |_, arguments| {
        let Sync { id } = decode(arguments)?;
        Ok(Some(json!(id)))
    }),
    (SYNC_DELIMITED, |_, arguments| {
        let Sync { id } = decode(arguments)?;
        Ok(Some(json!(id)))
    }),
];

/// It is not answered unless it fails.
const SHUTDOWN: &str = "guest-shutdown";
/// Its answer begins with [`DELIMITER`].
const SYNC_DELIMITED: &str = "guest-sync-delimited";

/// A request.
#[derive(Debug, Deserialize)]
struct Request {
    execute: String,
    #[serde(default)]
    arguments: Value,
    /// What the answer repeats.
    id: Option<Value>,
}

#[derive(Deserialize)]
struct Number {
    pid: i64,
}

#[derive(Deserialize)]
struct NewTime {
    /// Nanoseconds since 1970-01-01 UTC.
    time: i64,
}

#[derive(Deserialize)]
struct Shutdown {
    mode: Option<String>,
}

#[derive(Deserialize)]
struct Sync {
    id: i64,
}

/// The agent of a system: the processes that it has started.
#[derive(Debug, Default)]
pub struct Agent {
    processes: Processes,
}

impl Agent {
    /// The answer to a line of [`crate::Requests`], with its end; `None` if there is none.
    pub fn answer(&mut self, line: Option<&[u8]>) -> Option<Vec<u8>> {
        let request = match line {
            Some(line) => serde_json::from_slice::<Request>(line).map_err(Failure::from),
            None => Err(Failure::new("the request is too long")),
        };
        let (result, id, is_delimited) = match request {
            Ok(request) => {
                let result = self.carry_out(&request.execute, request.arguments);
                (result, request.id, request.execute == SYNC_DELIMITED)
            }
            Err(failure) => (Err(failure), None, false),
        };
        let mut answer = match result {
            Ok(value) => json!({ "return": value? }),
            Err(failure) => json!({ "error": failure.to_json() }),
        };
        if let Some(id) = id {
            answer["id"] = id;
        }
        let mut bytes = Vec::new();
        bytes.extend(is_delimited.then_some(DELIMITER));
        bytes.extend_from_slice(answer.to_string().as_bytes());
        bytes.push(b'\n');
        Some(bytes)
    }

    fn carry_out(&mut self, name: &str, arguments: Value) -> Result<Option<Value>, Failure> {
        let mut commands = COMMANDS.iter();
        match commands.find(|(known, _)| *known == name) {
            Some((_, command)) => command(self, arguments),
            None => Err(Failure::unknown_command(name)),
        }
    }
}

/// Arguments of a command; those that it has none of may be left out.
fn decode<T: DeserializeOwned>(arguments: Value) -> Result<T, Failure> {
    let arguments = match arguments {
        Value::Null => json!({}),
        given => given,
    };
    Ok(serde_json::from_value(arguments)?)
}

/// Whether there is a request in what a host may send, decoded and not carried out, for fuzzing.
pub fn is_request(bytes: &[u8]) -> bool {
    let (mut requests, mut is_one) = (Requests::default(), false);
    requests.read(bytes, |line| {
        let request = line.and_then(|line| serde_json::from_slice::<Request>(line).ok());
        let Some(Request { arguments, .. }) = request else {
            return;
        };
        is_one = true;
        // Whatever the command is.
        let input = decode::<Start>(arguments.clone()).and_then(|start| start.input());
        let number = decode::<Sync>(arguments.clone()).map(|sync| sync.id);
        let mode = decode::<Shutdown>(arguments).map(|shutdown| shutdown.mode);
        drop((input, number, mode));
    });
    is_one
}

/// The agent's version, and its commands.
fn info() -> Value {
    let commands = COMMANDS.iter().map(
        |(name, _)| json!({ "name": name, "enabled": true, "success-response": *name != SHUTDOWN }),
    );
    json!({
        "version": format!("keel-guest {}", env!("CARGO_PKG_VERSION")),
        "supported_commands": commands.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(agent: &mut Agent, request: &Value) -> Value {
        let answer = agent.answer(Some(request.to_string().as_bytes())).unwrap();
        assert_eq!(answer.last(), Some(&b'\n'));
        serde_json::from_slice(&answer).unwrap()
    }

    fn returned(agent: &mut Agent, command: &str) -> Value {
        let mut answer = ask(agent, &json!({ "execute": command }));
        assert!(answer["error"].is_null(), "{command}: {answer}");
        answer["return"].take()
    }

    #[test]
    fn an_exchange_begins_with_a_number_that_is_repeated() {
        let mut agent = Agent::default();
        let sync = json!({ "execute": "guest-sync", "arguments": { "id": 7 }, "id": "x" });
        let answer = ask(&mut agent, &sync);
        assert_eq!(answer, json!({ "return": 7, "id": "x" }));
        let sync = br#"{"execute": "guest-sync-delimited", "arguments": {"id": 4294967295}}"#;
        let answer = agent.answer(Some(sync)).unwrap();
        assert_eq!(answer, b"\xff{\"return\":4294967295}\n");
    }

    #[test]
    fn what_is_no_request_is_answered_by_an_error() {
        let mut agent = Agent::default();
        for (line, class, reason) in [
            (&b"{"[..], "GenericError", "EOF"),
            (b"[1]", "GenericError", "invalid"),
            (
                br#"{"execute": "guest-none"}"#,
                "CommandNotFound",
                "guest-none",
            ),
            (br#"{"execute": "guest-sync"}"#, "GenericError", "id"),
            (
                br#"{"execute": "guest-exec", "arguments": {"path": 7}}"#,
                "GenericError",
                "string",
            ),
            (
                br#"{"execute": "guest-shutdown", "arguments": {"mode": "fast"}}"#,
                "GenericError",
                "fast",
            ),
            (br#"{"execute": "guest-set-time"}"#, "GenericError", "time"),
        ] {
            let answer = agent.answer(Some(line)).unwrap();
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            assert_eq!(answer["error"]["class"], class, "{answer}");
            let said = answer["error"]["desc"].as_str().unwrap();
            assert!(said.contains(reason), "{said}");
        }
        let answer = agent.answer(None).unwrap();
        assert!(String::from_utf8(answer).unwrap().contains("too long"));
    }

    #[test]
    fn an_agent_says_what_it_can() {
        let mut agent = Agent::default();
        let info = returned(&mut agent, "guest-info");
        let commands = info["supported_commands"].as_array().unwrap();
        assert_eq!(commands.len(), COMMANDS.len());
        let unanswered = commands.iter().filter(|it| it["success-response"] == false);
        assert_eq!(unanswered.count(), 1);
        assert!(COMMANDS.is_sorted_by_key(|(name, _)| *name));
    }

    #[test]
    fn a_system_is_described() {
        let mut agent = Agent::default();
        let name = returned(&mut agent, "guest-get-host-name");
        assert!(!name["host-name"].as_str().unwrap().is_empty());
        let system = returned(&mut agent, "guest-get-osinfo");
        assert!(!system["kernel-release"].as_str().unwrap().is_empty());
        let load = returned(&mut agent, "guest-get-load");
        assert!(load["load1m"].as_f64().unwrap() >= 0.0);
        let time = returned(&mut agent, "guest-get-time");
        assert!(time.as_i64().unwrap() > 1_700_000_000_000_000_000);
        let interfaces = returned(&mut agent, "guest-network-get-interfaces");
        let interfaces = interfaces.as_array().unwrap();
        let loopback = interfaces.iter().find(|it| it["name"] == "lo").unwrap();
        assert_eq!(loopback["ip-addresses"][0]["ip-address"], "127.0.0.1");
        assert_eq!(loopback["ip-addresses"][0]["prefix"], 8);
        for system in returned(&mut agent, "guest-get-fsinfo").as_array().unwrap() {
            let [used, total] = ["used-bytes", "total-bytes"].map(|it| system[it].as_u64());
            assert!(used.unwrap() <= total.unwrap(), "{system}");
        }
    }
}
