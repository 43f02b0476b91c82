//! Topics that are made for a while.

use std::time::{Duration, Instant};

use futures::executor::block_on;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::types::RDKafkaErrorCode;

use super::{Cluster, Context, Error, refused};

/// How long the brokers may take to make or delete topics.
const ANSWER: Duration = Duration::from_secs(15);

/// Topics that belong to whoever made them. Dropping this deletes them, with all that is in them.
pub struct OwnTopics {
    admin: AdminClient<Context>,
    brokers: String,
    names: Vec<String>,
}

impl OwnTopics {
    /// Makes topics of so many partitions each, replicated as the cluster does by default, and waits until they can be
    /// written. A name that is taken is an error, and then none is left.
    pub fn create(cluster: &Cluster, names: &[String], partitions: u32) -> Result<Self, Error> {
        cluster.check()?;
        let admin = cluster.base()?.create_with_context(Context::new("admin")).map_err(refused)?;
        let mut made = Self { admin, brokers: cluster.brokers.clone(), names: Vec::new() };
        for name in names {
            let topic = NewTopic::new(name, partitions as i32, TopicReplication::Fixed(-1));
            let done = block_on(made.admin.create_topics([&topic], &options()));
            for result in done.map_err(|source| made.unreachable(&format!("make `{name}`"), source))? {
                result.map_err(|(topic, code)| made.refused("made", topic, code))?;
                made.names.push(name.clone());
            }
        }
        made.names.iter().try_for_each(|name| made.settled(name, partitions as usize))?;
        Ok(made)
    }

    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Deletes them; one that is gone already is no error.
    pub fn delete(mut self) -> Result<(), Error> {
        self.delete_all()
    }

    fn delete_all(&mut self) -> Result<(), Error> {
        let names = std::mem::take(&mut self.names);
        if names.is_empty() {
            return Ok(());
        }
        let each: Vec<&str> = names.iter().map(String::as_str).collect();
        let done = block_on(self.admin.delete_topics(&each, &options()));
        for result in done.map_err(|source| self.unreachable(&format!("delete `{}`", names.join("`, `")), source))? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
                Err((topic, code)) => return Err(self.refused("deleted", topic, code)),
            }
        }
        Ok(())
    }

    /// Waits until a broker says who leads each partition: what was made is heard of a moment later.
    fn settled(&self, name: &str, partitions: usize) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            let metadata = self.admin.inner().fetch_metadata(Some(name), ANSWER);
            let metadata = metadata.map_err(|source| self.unreachable(&format!("lead `{name}`"), source))?;
            let leads = |topic: &rdkafka::metadata::MetadataTopic| {
                topic.partitions().iter().filter(|partition| partition.leader() >= 0).count()
            };
            match metadata.topics().iter().find(|topic| topic.name() == name) {
                Some(topic) if leads(topic) == partitions => return Ok(()),
                _ if began.elapsed() < ANSWER => std::thread::sleep(Duration::from_millis(20)),
                _ => return Err(self.refused("used", name.to_owned(), RDKafkaErrorCode::LeaderNotAvailable)),
            }
        }
    }

    fn unreachable(&self, what: &str, source: rdkafka::error::KafkaError) -> Error {
        let last = self.admin.inner().context().last_error();
        Error::Unreachable { brokers: self.brokers.clone(), what: format!("to {what}"), last, source }
    }

    fn refused(&self, done: &'static str, topic: String, code: RDKafkaErrorCode) -> Error {
        Error::Topic { topic, done, brokers: self.brokers.clone(), why: code.to_string() }
    }
}

impl Drop for OwnTopics {
    fn drop(&mut self) {
        let names = self.names.join(", ");
        if let Err(error) = self.delete_all() {
            tracing::error!(names, %error, "kafka: topics that are of no more use are left; delete them");
        }
    }
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ANSWER)).operation_timeout(Some(ANSWER))
}
