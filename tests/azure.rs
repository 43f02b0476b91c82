//! The promises of publishing against Azurite, Microsoft's emulator of Azure Blob Storage, which `scripts/services.sh up azure`
//! starts; all of it by TLS, with an authority of its own.

mod common;
#[path = "common/node.rs"]
mod node;
#[path = "common/store.rs"]
mod store;

use std::path::Path;
use std::process::Command;

use common::{Job, TIDEMILL, generate};
use node::Serving;
use store::{block_on, refused, snapshots};
use tidemill::snapshot::{Store, Version};

fn variable(name: &str) -> String {
    store::variable("azure", name)
}

/// A prefix of its own in the container, with more options.
fn address(what: &str, options: &str) -> String {
    let (container, endpoint) = (variable("TIDEMILL_TEST_AZURE_CONTAINER"), variable("TIDEMILL_TEST_AZURE"));
    let ca = variable("TIDEMILL_TEST_AZURE_CA");
    format!("az://{container}/{}?endpoint={endpoint}&ca_file={ca}{options}", store::prefix(what))
}

/// With a token that may only read and list, instead of the key.
fn as_reader(command: &mut Command) {
    command.env_remove("AZURE_STORAGE_ACCOUNT_KEY");
    command.env("AZURE_STORAGE_SAS_TOKEN", variable("TIDEMILL_TEST_AZURE_READER_TOKEN"));
}

/// The container, by its provider's own client.
fn bucket() -> object_store::azure::MicrosoftAzure {
    let ca = std::fs::read(variable("TIDEMILL_TEST_AZURE_CA")).unwrap();
    let ca = object_store::Certificate::from_pem(&ca).unwrap();
    object_store::azure::MicrosoftAzureBuilder::from_env()
        .with_container_name(variable("TIDEMILL_TEST_AZURE_CONTAINER"))
        .with_endpoint(variable("TIDEMILL_TEST_AZURE"))
        .with_client_options(object_store::ClientOptions::new().with_root_certificate(ca))
        .build()
        .unwrap()
}

#[test]
fn a_list_of_more_than_a_page_is_whole() {
    store::a_list_of_more_than_a_page_is_whole(&address("page", ""), &bucket(), 5000);
}

#[test]
fn fulls_and_deltas_are_followed_as_they_were_published() {
    store::fulls_and_deltas_are_followed_as_they_were_published(&address("follow", ""));
}

#[test]
fn a_trainer_that_was_paused_cannot_publish_once_another_has_taken_the_channel() {
    store::a_trainer_that_was_paused_cannot_publish_once_another_has_taken_the_channel(&address("fence", ""));
}

#[test]
fn what_is_larger_than_a_part_travels_in_parts() {
    store::what_is_larger_than_a_part_travels_in_parts(&address("parts", "&part_mib=5&parallel=2"));
}

#[test]
fn create_if_absent_is_real_when_writers_race() {
    store::create_if_absent_is_real_when_writers_race(&address("race", ""));
}

#[test]
fn a_job_publishes_to_a_container_a_node_follows_and_a_person_takes_it_back() {
    let url = address("loop", "");
    store::a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back(&url, "create-only writes work");
}

#[test]
fn a_log_in_a_container_is_learned_to_the_bytes_of_the_same_files_and_resumed() {
    store::a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed(&address("log", ""), &bucket());
}

#[test]
fn what_is_wrong_with_a_store_is_said_with_what_to_do() {
    let url = address("wrong", "");
    let (key, account) = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCOUNT_NAME");
    let said = refused(&url, |command| _ = command.env(key, "YW5vdGhlcg=="));
    assert!(said.contains("the key or token does not fit the account") && said.contains(&url[..20]), "{said}");
    let said = refused(&url, |command| _ = command.env(account, "nobody"));
    assert!(said.contains("the key or token does not fit the account"), "{said}");
    let said = refused(&format!("{url}&account=nobody"), |_| ());
    assert!(said.contains("the key or token does not fit the account"), "{said}");
    let said = refused(&url, |command| _ = command.env_remove(account));
    assert!(said.contains("the option `account` or in AZURE_STORAGE_ACCOUNT_NAME"), "{said}");
    let said = refused(&url, |command| _ = command.env(key, "not base64!"));
    assert!(said.contains("AZURE_STORAGE_ACCOUNT_KEY must be base64") && !said.contains("not base64!"), "{said}");
    let said = refused(&format!("{url}&anonymous=true"), |_| ());
    assert!(said.contains("does not fit the account"), "{said}");
    let container = format!("az://{}/", variable("TIDEMILL_TEST_AZURE_CONTAINER"));
    let said = refused(&url.replace(&container, "az://no-such-container/"), |_| ());
    assert!(said.contains("no such bucket"), "{said}");
    let endpoint = variable("TIDEMILL_TEST_AZURE");
    let said = refused(&url.replace(&endpoint, &format!("{endpoint}-not")), |_| ());
    assert!(said.contains("or the account"), "{said}");
    let said = refused(&url.replace(&endpoint, "https://127.0.0.1:9/a"), |_| ());
    assert!(said.contains("nothing answers at the endpoint"), "{said}");
    let said = refused(&url.replace(&endpoint, &endpoint.replace("https", "http")), |_| ());
    assert!(said.contains("allow_http=true"), "{said}");
    let said = refused(url.split_once("&ca_file").unwrap().0, |_| ());
    assert!(said.contains("`ca_file`"), "{said}");
}

#[test]
fn a_token_that_may_only_read_serves_a_node_and_publishes_nothing() {
    let url = address("reader", "");
    let input = generate(&["-n", "2000"]);
    let job = Job::over(&input.path().join("in"));
    let store = format!("snapshots.store={url:?}");
    let version = Version(job.train(&["--until-end", "--set", &store])["snapshot_version"].as_u64().unwrap());

    let mut denied = job.command(&["--until-end", "--set", &store]);
    as_reader(&mut denied);
    let output = denied.output().unwrap();
    let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("access is denied"), "{said}");
    let output = snapshots(&url, &["pin", &version.to_string()], as_reader);
    said += &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("access is denied"), "{said}");
    let output = snapshots(&url, &["list"], |command| {
        as_reader(command);
        let token = variable("TIDEMILL_TEST_AZURE_READER_TOKEN").replace("sp=rl", "sp=rwl");
        command.env("AZURE_STORAGE_SAS_TOKEN", token);
    });
    said += &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("does not fit the account"), "{said}");
    let token = variable("TIDEMILL_TEST_AZURE_READER_TOKEN");
    assert!(!said.contains(token.split_once("sig=").unwrap().1), "the token is in what was said: {said}");

    let mut command = Command::new(TIDEMILL);
    as_reader(&mut command);
    Serving::start_by(command, Path::new(&url), &[]).serves(version);
    let output = snapshots(&url, &["verify"], as_reader);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_address_that_other_tools_use_leads_to_the_same_container() {
    let url = address("abfss", "");
    let account = variable("AZURE_STORAGE_ACCOUNT_NAME");
    let container = variable("TIDEMILL_TEST_AZURE_CONTAINER");
    let other =
        url.replace(&format!("az://{container}/"), &format!("abfss://{container}@{account}.dfs.core.windows.net/"));
    // A slash behind the endpoint does not matter.
    let endpoint = variable("TIDEMILL_TEST_AZURE");
    let other = other.replace(&endpoint, &format!("{endpoint}/"));
    store::fulls_and_deltas_are_followed_as_they_were_published(&url);
    let versions = block_on(Store::open(&other).unwrap().versions()).unwrap();
    assert_eq!(versions.into_keys().collect::<Vec<_>>(), (1..=4).map(Version).collect::<Vec<_>>());
}
