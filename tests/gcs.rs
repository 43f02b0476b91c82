//! The promises of publishing by the protocol of Google Cloud Storage, against what `scripts/services.sh up gcs` starts: a real
//! server, SeaweedFS, that shares its requests with the XML API of GCS, behind one that turns GCS's create-if-absent into the server's
//! own; and the same without that, which is what users of a store without create-if-absent see.

mod common;
#[path = "common/node.rs"]
mod node;
#[path = "common/store.rs"]
mod store;

use common::{Job, generate};
use store::{block_on, check, refused};
use tidemill::snapshot::{Error, Store};

fn variable(name: &str) -> String {
    store::variable("gcs", name)
}

fn address_at(endpoint: &str, what: &str, options: &str) -> String {
    let (bucket, endpoint) = (variable("TIDEMILL_TEST_GCS_BUCKET"), variable(endpoint));
    format!("gs://{bucket}/{}?endpoint={endpoint}&allow_http=true{options}", store::prefix(what))
}

/// A prefix of its own in the bucket, with more options.
fn address(what: &str, options: &str) -> String {
    address_at("TIDEMILL_TEST_GCS", what, options)
}

/// As [`address`], in a store without create-if-absent.
fn unsafe_address(what: &str, options: &str) -> String {
    address_at("TIDEMILL_TEST_GCS_UNSAFE", what, options)
}

/// The bucket, by its provider's own client.
fn bucket() -> object_store::gcp::GoogleCloudStorage {
    object_store::gcp::GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(variable("TIDEMILL_TEST_GCS_BUCKET"))
        .with_base_url(&variable("TIDEMILL_TEST_GCS"))
        .with_client_options(object_store::ClientOptions::new().with_allow_http(true))
        .build()
        .unwrap()
}

#[test]
fn a_list_of_more_than_a_page_is_whole() {
    store::a_list_of_more_than_a_page_is_whole(&address("page", ""), &bucket(), 1000);
}

#[test]
fn a_store_that_creates_what_is_there_already_is_found_and_refused() {
    let url = unsafe_address("refused", "");
    let error = block_on(Store::create(&url).unwrap().race(1, 4)).unwrap_err();
    assert!(matches!(error, Error::NotCreateOnly { .. }), "{error}");
    assert!(error.to_string().contains("of 5 writers that created one object, 5 were told that they did"), "{error}");

    let input = generate(&["-n", "500"]);
    let job = Job::over(&input.path().join("in"));
    let said = job.fails(&["--until-end", "--set", &format!("snapshots.store={url:?}")]);
    assert!(said.contains("cannot be published to") && said.contains("`unsafe_create=single-writer`"), "{said}");
    let (content, said) = check(&job, &url);
    assert!(
        !content && said.contains("cannot be published to") && said.contains("`unsafe_create=single-writer`"),
        "{said}"
    );

    // Neither left anything behind.
    let store = Store::open(&url).unwrap();
    assert_eq!(block_on(store.parts()).unwrap(), []);
    assert!(block_on(store.channels()).unwrap().is_empty());
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
fn a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back() {
    let url = address("loop", "");
    store::a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back(&url, "create-only writes work");
}

#[test]
fn a_store_without_create_if_absent_does_all_of_it_for_a_single_writer_that_asks_for_it() {
    let url = unsafe_address("loop", "&unsafe_create=single-writer");
    store::a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back(&url, "UNSAFE, single-writer");
}

#[test]
fn a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed() {
    store::a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed(&address("log", ""), &bucket());
}

#[test]
fn what_is_wrong_with_a_store_is_said_with_what_to_do() {
    let url = address("wrong", "");
    let bucket = format!("gs://{}/", variable("TIDEMILL_TEST_GCS_BUCKET"));
    let said = refused(&url.replace(&bucket, "gs://no-such-bucket/"), |_| ());
    assert!(said.contains("no such bucket"), "{said}");
    let said = refused(&url.replace(&variable("TIDEMILL_TEST_GCS"), "http://127.0.0.1:9"), |_| ());
    assert!(said.contains("nothing answers at the endpoint"), "{said}");
    let said = refused(&url.replace("&allow_http=true", ""), |_| ());
    assert!(said.contains("allow_http=true"), "{said}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("account.json");
    for content in [None, Some("{}"), Some(r#"{"client_email": "a@b", "private_key": "hush", "private_key_id": "1"}"#)]
    {
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        let said = refused(&url, |command| _ = command.env("GOOGLE_SERVICE_ACCOUNT", &file));
        let expected =
            "its credentials cannot be used, correct what GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT";
        assert!(said.contains(expected) && !said.contains("hush"), "{content:?}: {said}");
    }
}
