//! The test-suite in two parts: the usual one, which takes some minutes, and groups of long tests,
//! each about one subject. `all` runs both, followed by the soak and nemesis.

use crate::command::{cargo, check, guest_agent, has, provide};
use crate::linux;
use crate::nemesis;
use crate::soak::{self, Soak};
use anyhow::Result;
use std::process::Command;

/// Programs that tests or builds need, with their Debian packages.
const NEEDED: [(&str, &str); 6] = [
    ("cc", "gcc"),
    ("cpio", "cpio"),
    ("etcd", "etcd-server"),
    ("qemu-ga", "qemu-guest-agent"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("promtool", "prometheus"),
];

/// Runs of the soak, and minutes of nemesis, after all tests.
const SOAK_RUNS: u64 = 60;
const NEMESIS_MINUTES: u64 = 5;

/// Long tests about one subject.
pub(crate) struct Group {
    pub(crate) name: &'static str,
    /// Crates, by their folders, whose change selects the group.
    pub(crate) crates: &'static [&'static str],
    /// Milliseconds by which each message between nodes is delayed.
    message_delay_ms: Option<&'static str>,
    /// Names of tests, with their modules.
    tests: &'static [&'static str],
}

/// All groups of long tests. Other tests are in the usual suite.
pub(crate) const LONG: &[Group] = &[
    Group {
        name: "failpoints at every step",
        crates: &["kind-wasm", "machine", "node", "store", "cluster"],
        message_delay_ms: None,
        tests: &[
            "failpoints::source_agent_killed_or_failed_at_each_step",
            "failpoints::target_agent_killed_or_failed_at_each_step",
            "failpoints::source_worker_killed_or_failed_at_each_step",
            "failpoints::target_worker_killed_or_failed_at_each_step",
            "failpoints::process_killed_or_failed_at_each_step_of_post_copy",
            "failpoints::process_killed_or_failed_at_each_step_of_a_checkpoint",
            "failpoints::process_killed_or_failed_at_each_step_of_a_restore_start_or_end",
            "failpoints::process_killed_or_failed_at_each_step_of_a_spanning_start",
            "failpoints::agents_killed_or_failed_at_each_step_of_a_home_migration",
            "failpoints::workers_killed_or_failed_at_each_step_of_a_home_migration",
            "ownership::a_worker_that_dies_in_doubt_leaves_one_copy",
            "ownership::a_worker_in_arrival_is_not_taken_for_one_left_over",
        ],
    },
    Group {
        name: "ownership on many seeds",
        crates: &["machine"],
        message_delay_ms: None,
        tests: &["one_copy_runs_on_many_more_seeds", "broken_rules_are_found"],
    },
    Group {
        name: "gossip",
        crates: &["cluster", "node"],
        message_delay_ms: None,
        tests: &[
            "a_thousand_nodes_in_figures",
            "gossip::a_removed_node_makes_the_keys_be_replaced",
            "gossip::a_node_whose_datagrams_do_not_arrive_is_alive_and_silent",
        ],
    },
    Group {
        name: "another kind of machine",
        crates: &["machine", "kind-null", "node"],
        message_delay_ms: None,
        tests: &[
            "null_moves_survive_faults_of_agents",
            "null_moves_survive_faults_of_workers",
            "null_checkpoints_and_starts_survive_faults",
            "a_drain_moves_machines_of_all_kinds",
        ],
    },
    Group {
        name: "spanning",
        crates: &["kind-wasm", "machine", "wasm", "node"],
        message_delay_ms: None,
        tests: &[
            "parts_come_and_go_while_it_runs",
            "who_is_lost_while_parts_come_and_go",
            "memory::what_is_larger_than_a_part_begins_on_several",
            "a_node_that_is_cut_off_is_a_lost_part",
            "rules_and_drains_hold_for_parts",
            "who_does_not_answer_is_named",
            "threads_are_spread_from_the_first_on",
            "memory::the_home_of_what_is_larger_than_a_part_moves",
            "the_home_moves_while_it_runs",
            "limits::idle_memory_is_reported",
            "fine_grained::threads_that_share_pages_are_brought_together",
            "zstd_compresses_the_same_on_three_parts",
            "parts_join_and_leave_while_it_runs",
        ],
    },
    Group {
        name: "checkpoints",
        crates: &["kind-wasm", "machine", "node"],
        message_delay_ms: None,
        tests: &[
            "volumes_are_part_of_checkpoints",
            "parts::a_checkpoint_of_several_parts_is_consistent",
            "parts::memory_larger_than_a_part_is_restored_to_several",
            "parts::a_full_checkpoint_follows_the_return_to_one_part",
            "every_checkpoint_of_a_chain_can_be_restored",
            "threads_and_their_waits_are_restored",
            "parts::unchanged_pages_of_parts_are_not_stored_again",
            "compaction_preserves_the_machine",
            "an_unreachable_store_is_reported",
        ],
    },
    Group {
        name: "clusters",
        crates: &["store", "cluster", "net", "node"],
        message_delay_ms: None,
        tests: &[
            "life_cycle::silence_is_no_proof_of_death",
            "life_cycle::threads_move_with_their_machine_and_results_are_the_same",
            "start::a_machine_that_starts_is_shown_and_runs_when_detach_returns",
            "logs_since::output_never_becomes_less",
            "store_voters::a_voter_whose_disk_is_full_is_none_to_spare",
            "failover::a_machine_waits_until_the_operators_program_switched_its_node_off",
            "failover::room_is_kept_for_the_loss_of_a_node",
            "addresses::the_only_voter_gets_another_address",
            "log_gap::a_machine_that_floods_its_output_moves",
            "certificates::the_authority_is_replaced_while_machines_run",
            "store_voters::a_leader_that_stands_still_is_replaced_and_comes_back_as_a_follower",
            "store_voters::a_zone_that_comes_later_gets_a_voter",
            "addresses::each_voter_of_three_gets_another_address",
            "leave::a_node_leaves_and_joins_again",
            "leave::the_machines_of_a_dead_node_are_given_up_when_somebody_says_so",
            "store_voters::a_voter_whose_copy_is_damaged_gets_another_one",
            "certificates::a_replacement_waits_for_every_node_and_survives_its_leader",
        ],
    },
    Group {
        name: "a store outside of the nodes",
        crates: &["store", "node"],
        message_delay_ms: None,
        tests: &[
            "histories_are_linearizable_while_members_fail",
            "histories_are_linearizable_while_members_are_cut_off",
            "external_store::an_etcd_that_asks_for_a_certificate_is_used_by_nodes_that_have_one",
            "external_store::the_store_is_moved_out_of_the_nodes_while_machines_run",
            "external_store::machines_move_and_fail_over_and_the_node_that_began_the_cluster_is_not_needed",
        ],
    },
    Group {
        name: "whole systems",
        crates: &["kind-qemu", "machine", "node"],
        message_delay_ms: None,
        tests: &[
            "networks::systems_answer_while_they_are_balanced_and_agents_are_killed",
            "qemu::a_fault_after_the_commit_leaves_one_system",
            "qemu::systems_and_programs_are_balanced_together",
            "qemu::a_hot_node_gives_a_system_away",
            "qemu::a_system_that_cannot_run_where_it_arrived_goes_on_at_its_source",
            "failover::a_system_whose_node_is_cut_off_runs_on_one_node",
            "failover::high_availability_that_cannot_be_is_refused_when_it_is_asked_for",
            "networks::a_system_stays_where_its_network_is",
            "networks::a_copy_that_is_not_the_machine_is_not_in_its_network",
        ],
    },
    Group {
        name: "memory and disks of whole systems",
        crates: &["kind-qemu", "machine", "node", "balance"],
        message_delay_ms: None,
        tests: &[
            "checkpoints::a_system_goes_on_from_its_checkpoint_with_its_disk",
            "checkpoints::a_move_gives_a_checkpoint_up_and_a_damaged_one_is_passed_over",
            "checkpoints::what_a_checkpoint_of_a_system_cannot_be_is_refused",
            "checkpoints::a_system_with_its_own_disk_goes_on_elsewhere_when_its_node_fails",
            "own_disk::the_own_disk_of_a_system_is_there_when_it_is_started_again",
            "own_disk::the_own_disk_of_a_system_stays_when_its_process_is_lost",
            "post_copy::memory_comes_after_a_system",
            "agent::a_restored_system_has_the_time_of_its_host",
            "memory::a_system_gives_memory_back_to_its_node",
            "qemu::a_system_that_heeds_no_power_button_has_its_time",
            "own_disk::the_own_disk_of_a_system_moves_along",
            "full_disk::a_system_waits_for_room_on_its_disk",
            "images::systems_begin_with_images_that_have_a_name",
            "images::two_nodes_keep_an_image_whichever_node_is_lost",
        ],
    },
    Group {
        name: "consoles, displays and agents of whole systems",
        crates: &["kind-qemu", "guest", "node"],
        message_delay_ms: None,
        tests: &[
            "console::a_console_outlives_an_agent_and_ends_with_its_boot",
            "console::a_console_ends_with_its_system",
            "console::a_console_is_left_although_its_system_takes_nothing",
            "display::a_viewer_sees_a_system_and_types_there_from_any_node",
            "agent::an_agent_shuts_its_system_down",
            "agent::a_system_without_an_agent_executes_nothing",
            "agent::a_system_installs_the_agent_that_it_is_given",
        ],
    },
    Group {
        name: "high availability",
        crates: &["store", "cluster", "node", "machine"],
        message_delay_ms: None,
        tests: &[
            "protected_output::what_readers_saw_is_never_undone",
            "failover::output_survives_the_failure_of_its_node",
            "failover::a_machine_on_its_way_from_a_node_that_fails_leaves_no_process_behind",
            "failover::a_machine_on_arrival_at_a_node_that_fails_goes_on_at_its_source",
            "failover::machines_run_on_while_their_agent_is_restarted_on_request",
            "failover::a_damaged_copy_of_a_checkpoint_is_fetched_again",
            "failover::a_machine_with_parts_goes_on_whole_from_its_checkpoint",
            "failover::high_availability_is_turned_on_and_off_while_a_machine_runs",
            "failover::a_worker_that_stands_still_is_killed_when_the_lease_ends",
        ],
    },
    Group {
        name: "clusters with late messages",
        crates: &["store", "cluster", "net", "node"],
        message_delay_ms: Some("30"),
        tests: &[
            "life_cycle::requests::machines_are_kept_and_made_again",
            "life_cycle::memory_comes_after_the_machine",
            "life_cycle::threads_move_with_their_machine_and_results_are_the_same",
            "life_cycle::silence_is_no_proof_of_death",
        ],
    },
    Group {
        name: "volumes",
        crates: &["wasi", "kind-wasm", "machine", "node"],
        message_delay_ms: None,
        tests: &[
            "cluster_volumes::nothing_synced_is_lost_at_any_step_of_a_move",
            "cluster_volumes::checkpoints_take_volumes_along",
        ],
    },
    Group {
        name: "balancing",
        crates: &["balance", "sim", "node"],
        message_delay_ms: None,
        tests: &[
            "balance::the_past_is_known_when_the_source_is_gone",
            "balance::unlike_nodes_end_level_in_relative_load",
            "drain::a_drained_node_is_empty_closed_and_opened_again",
            "fine_grained::a_program_outgrows_its_node_by_itself",
            "fine_grained::what_is_suggested_is_not_done",
            "fine_grained::memory_that_rests_goes_where_it_fits",
            "balance::promises_count_where_they_are_wanted_and_who_opted_out_stays",
            "balance::new_machines_start_where_there_is_least_to_do",
            "it_converges_from_any_start",
            "no_move_breaks_a_rule_on_any_seed",
        ],
    },
    Group {
        name: "coherence",
        crates: &["wasm"],
        message_delay_ms: None,
        tests: &[
            "exhaustive::pages_and_directories_that_move",
            "exhaustive::the_home_moves",
            "exhaustive::a_part_that_leaves",
            "randomized::seeds",
        ],
    },
    Group {
        name: "engine",
        crates: &["wasm", "wasi"],
        message_delay_ms: None,
        tests: &[
            "changed_modules",
            "changed_instrumented_modules",
            "core",
            "operands::a_block_with_very_many_operands",
            "references_and_tables",
            "several_wide_memories",
            "guests::programs_with_threads",
            "guests::threads_at_a_high_rate",
            "guests::zstd",
            "zstd",
            "bad_input::descriptors_end_at_their_limit",
        ],
    },
];

/// Runs the tests that `args` select; by default the usual suite, and with `all` everything else
/// too.
pub(crate) fn run(args: &[String], all: bool) -> Result<()> {
    provide(&NEEDED)?;
    linux::provide();
    if let Err(error) = guest_agent() {
        println!("a test with Evenkeel's guest agent will be skipped: {error:#}");
    }
    if !args.is_empty() {
        return check(runner(None).args(args));
    }
    run_usual()?;
    if all {
        for group in LONG {
            run_group(group)?;
        }
        soak::soak(&Soak {
            minutes: None,
            runs: SOAK_RUNS,
            busy: 2,
            only: None,
            keel: None,
            seed: 1,
        })?;
        nemesis::run(NEMESIS_MINUTES, false, None, &[])?;
    }
    Ok(())
}

/// Runs the usual suite: all tests but the long ones.
pub(crate) fn run_usual() -> Result<()> {
    let long = LONG.iter().flat_map(|group| group.tests);
    let mut command = runner(None);
    if has("cargo-nextest") {
        let long: Vec<String> = long.map(|name| format!("test(={name})")).collect();
        command.args(["-E", &format!("not ({})", long.join(" | "))]);
    } else {
        command.args(["--", "--exact"]);
        for name in long {
            command.args(["--skip", name]);
        }
    }
    check(&mut command)
}

/// Runs a group of long tests.
pub(crate) fn run_group(group: &Group) -> Result<()> {
    println!("long tests: {}", group.name);
    let mut command = runner(group.message_delay_ms);
    if has("cargo-nextest") {
        let names = group.tests.iter().map(|name| format!("test(={name})"));
        command.args(["-E", &names.collect::<Vec<String>>().join(" | ")]);
    } else {
        command.args(["--", "--exact"]).args(group.tests);
    }
    check(&mut command)
}

/// The test runner with the whole workspace.
fn runner(message_delay_ms: Option<&str>) -> Command {
    let mut command = cargo();
    match has("cargo-nextest") {
        true => command.args(["nextest", "run"]),
        false => command.arg("test"),
    };
    command.args(["--release", "--workspace", "--no-fail-fast"]);
    // The summary of a whole run lists failures with their causes, not backtraces.
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        command.env("RUST_BACKTRACE", "0");
    }
    if let Some(delay) = message_delay_ms {
        command.env("KEEL_NET_DELAY_MS", delay);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::root;
    use std::path::Path;

    /// The files of a test program, each with the path of its module.
    fn modules(folder: &Path, path: &str, found: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let file = entry.unwrap().path();
            let name = file.file_stem().unwrap().to_str().unwrap();
            let module = match name {
                "main" | "mod" => path.to_owned(),
                name => format!("{path}{name}::"),
            };
            if file.is_dir() {
                modules(&file, &module, found);
            } else if file.extension().is_some_and(|it| it == "rs") {
                found.push((module, std::fs::read_to_string(&file).unwrap()));
            }
        }
    }

    /// The files of all test programs: of each crate, the files and folders in `tests`.
    fn tests() -> Vec<(String, String)> {
        let mut found = Vec::new();
        for of_crate in std::fs::read_dir(root().join("crates")).unwrap() {
            let Ok(programs) = std::fs::read_dir(of_crate.unwrap().path().join("tests")) else {
                continue;
            };
            for program in programs {
                let program = program.unwrap().path();
                if program.is_dir() {
                    modules(&program, "", &mut found);
                } else if let Ok(text) = std::fs::read_to_string(&program) {
                    found.push((String::new(), text));
                }
            }
        }
        found
    }

    /// A renamed test would silently move from its group to the usual suite.
    #[test]
    fn long_tests_exist() {
        let files = tests();
        for group in LONG {
            for crate_name in group.crates {
                let folder = root().join("crates").join(crate_name);
                assert!(folder.is_dir(), "{}: {crate_name}", group.name);
            }
            for test in group.tests {
                let at = test.rfind("::").map_or(0, |at| at + 2);
                let (module, name) = test.split_at(at);
                let is_there = |(of, text): &(String, String)| {
                    of == module && text.contains(&format!("fn {name}("))
                };
                let is_there = files.iter().any(is_there);
                assert!(is_there, "{}: there is no test {test}", group.name);
            }
        }
    }
}
