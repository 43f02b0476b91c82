//! From an address to a store: a directory, `file://`, `s3://`, `gs://`, `az://` or `abfss://`, with options behind a `?`; and
//! from what a store answers to what a person can do about it.
//!
//! Credentials never stand in an address. They come from where each provider's tools look for them; what an address says
//! wins over the environment.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::{Error, Result};

/// How much is sent and fetched at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Limits {
    /// Bytes of a part. What is larger travels in parts.
    pub part: usize,
    /// Parts under way at a time.
    pub parallel: usize,
    /// How often a request without an answer is made, the first time included.
    pub attempts: u32,
}

/// S3 takes no smaller parts.
const SMALLEST_PART: usize = 5 << 20;

impl Default for Limits {
    fn default() -> Self {
        Self { part: 8 << 20, parallel: 4, attempts: 3 }
    }
}

/// What an address leads to.
#[derive(Debug)]
pub(super) struct Place {
    pub inner: Arc<dyn ObjectStore>,
    /// The directory, for a local store.
    pub local: Option<PathBuf>,
    pub limits: Limits,
    /// `unsafe_create=single-writer`.
    pub single_writer: bool,
}

/// The options of an address; none has an effect on what is written.
#[derive(Default)]
struct Options {
    endpoint: Option<String>,
    region: Option<String>,
    path_style: Option<bool>,
    allow_http: bool,
    ca_file: Option<PathBuf>,
    account: Option<String>,
    profile: Option<String>,
    anonymous: bool,
    limits: Limits,
    single_writer: bool,
}

const KNOWN: &str = "`endpoint`, `region`, `path_style`, `allow_http`, `ca_file`, `account`, `profile`, `anonymous`, `part_mib`, `parallel`, `unsafe_create`";

/// Opens what `url` names. `make`: a directory is made where there is none; a bucket never is.
pub(super) fn open(url: &str, make: bool) -> Result<Place> {
    let Some((scheme, rest)) = url.split_once("://") else {
        if url.is_empty() {
            return Err(refuse(url, "give a directory, or an address such as `s3://bucket/prefix`"));
        }
        return directory(url, PathBuf::from(url), make);
    };
    if scheme == "file" {
        if !rest.starts_with('/') {
            return Err(refuse(url, "after `file://` comes an absolute path, `file:///srv/snapshots`"));
        }
        return directory(url, PathBuf::from(rest), make);
    }
    let (bare, query) = url.split_once('?').map_or((url, ""), |(bare, query)| (bare, query));
    let rest = &bare[scheme.len() + 3..];
    let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = Path::parse(prefix.trim_end_matches('/'))
        .map_err(|e| refuse(bare, format!("`{prefix}` cannot be a prefix of keys: {e}")))?;
    if authority.is_empty() {
        return Err(refuse(bare, format!("name a bucket, `{scheme}://bucket/prefix`")));
    }
    let options = Options::parse(bare, query)?;
    if options.account.is_some() && !["az", "abfs", "abfss"].contains(&scheme) {
        return Err(refuse(bare, "`account` is an option of `az://`"));
    }
    if (options.region.is_some() || options.path_style.is_some() || options.profile.is_some()) && scheme != "s3" {
        return Err(refuse(bare, "`region`, `path_style` and `profile` are options of `s3://`"));
    }
    let inner: Arc<dyn ObjectStore> = match scheme {
        "s3" => Arc::new(PrefixStore::new(s3(bare, authority, &options)?, prefix)),
        "gs" => Arc::new(PrefixStore::new(gcs(bare, authority, &options)?, prefix)),
        "az" | "abfs" | "abfss" => Arc::new(PrefixStore::new(azure(bare, &options)?, prefix)),
        other => {
            return Err(refuse(
                bare,
                format!(
                    "`{other}://` is not known; there are `s3://`, `gs://`, `az://`, `abfss://`, `file://` and directories"
                ),
            ));
        }
    };
    Ok(Place { inner, local: None, limits: options.limits, single_writer: options.single_writer })
}

fn refuse(url: &str, reason: impl Into<String>) -> Error {
    Error::Address { url: url.to_owned(), reason: reason.into() }
}

fn directory(url: &str, dir: PathBuf, make: bool) -> Result<Place> {
    if make {
        std::fs::create_dir_all(&dir).map_err(|e| refuse(url, format!("cannot make the directory: {e}")))?;
    } else if !dir.is_dir() {
        return Err(refuse(url, "there is no such directory; is the name right, and has a trainer published there"));
    }
    let dir = dir.canonicalize().map_err(|e| refuse(url, e.to_string()))?;
    let inner = LocalFileSystem::new_with_prefix(&dir).map_err(|e| refuse(url, e.to_string()))?.with_fsync(true);
    Ok(Place { inner: Arc::new(inner), local: Some(dir), limits: Limits::default(), single_writer: false })
}

impl Options {
    /// Reads `name=value&name=value`, values percent-decoded. `bare` is the address without it, for messages: what stands
    /// here by mistake may be a secret.
    fn parse(bare: &str, query: &str) -> Result<Self> {
        let mut options = Self { limits: Limits { attempts: 2, ..Limits::default() }, ..Self::default() };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let Some((name, value)) = pair.split_once('=') else {
                return Err(refuse(bare, format!("the option `{pair}` has no value; write `{pair}=…`")));
            };
            let value = percent_encoding::percent_decode_str(value)
                .decode_utf8()
                .map_err(|_| refuse(bare, format!("the value of `{name}` is not UTF-8")))?
                .into_owned();
            let expected = |what: &str| refuse(bare, format!("`{name}` is `{value}`, expected {what}"));
            let flag = || value.parse::<bool>().map_err(|_| expected("`true` or `false`"));
            let number = |least: usize, most: usize| match value.parse::<usize>() {
                Ok(number) if (least..=most).contains(&number) => Ok(number),
                _ => Err(expected(&format!("a number from {least} to {most}"))),
            };
            match name {
                "endpoint" => {
                    if !value.starts_with("http://") && !value.starts_with("https://") {
                        return Err(expected("`https://host:port`"));
                    }
                    options.endpoint = Some(value.trim_end_matches('/').to_owned());
                }
                "region" => options.region = Some(value),
                "path_style" => options.path_style = Some(flag()?),
                "allow_http" => options.allow_http = flag()?,
                "ca_file" => options.ca_file = Some(value.into()),
                "account" => options.account = Some(value),
                "profile" => options.profile = Some(value),
                "anonymous" => options.anonymous = flag()?,
                "part_mib" => options.limits.part = number(SMALLEST_PART >> 20, 1024)? << 20,
                "parallel" => options.limits.parallel = number(1, 64)?,
                "unsafe_create" if value == "single-writer" => options.single_writer = true,
                "unsafe_create" => return Err(expected("`single-writer`")),
                _ => {
                    return Err(refuse(
                        bare,
                        format!(
                            "there is no option `{name}`, only {KNOWN}; keys and secrets come from the environment"
                        ),
                    ));
                }
            }
        }
        Ok(options)
    }

    /// How requests are made. `endpoint` is the one that is in force, wherever it comes from.
    fn client(&self, bare: &str, endpoint: Option<&str>, allowed: &str) -> Result<ClientOptions> {
        let allow_http = self.allow_http || std::env::var(allowed).is_ok_and(|value| value == "true");
        if endpoint.is_some_and(|endpoint| endpoint.starts_with("http://")) && !allow_http {
            return Err(refuse(
                bare,
                "its endpoint is `http://`, over which anybody can read and change what is sent; if that is meant, add the option `allow_http=true`",
            ));
        }
        // No limit to a whole request, for a payload may be large: one to each silence.
        let mut client = ClientOptions::new()
            .with_allow_http(allow_http)
            .with_timeout_disabled()
            .with_connect_timeout(Duration::from_secs(5))
            .with_read_timeout(Duration::from_secs(30))
            .with_pool_idle_timeout(Duration::from_secs(20));
        if let Some(path) = &self.ca_file {
            let wrong = |e: &dyn std::fmt::Display| refuse(bare, format!("`ca_file` is `{}`: {e}", path.display()));
            let pem = std::fs::read(path).map_err(|e| wrong(&e))?;
            let certificates = Certificate::from_pem_bundle(&pem).map_err(|e| wrong(&e))?;
            if certificates.is_empty() {
                return Err(wrong(&"there is no certificate in it; it must hold PEM, `-----BEGIN CERTIFICATE-----`"));
            }
            for certificate in certificates {
                client = client.with_root_certificate(certificate);
            }
        }
        Ok(client)
    }
}

/// With jitter; what is asked again after that is up to [`super::store::Store`].
fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.0,
        },
        max_retries: 4,
        retry_timeout: Duration::from_secs(60),
    }
}

fn s3(bare: &str, bucket: &str, options: &Options) -> Result<object_store::aws::AmazonS3> {
    if bucket.contains(['@', ':']) {
        return Err(refuse("s3://…", "no keys or ports belong before the bucket; keys come from the environment"));
    }
    let env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    let endpoint = options.endpoint.clone().or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
    builder = builder.with_client_options(options.client(bare, endpoint.as_deref(), "AWS_ALLOW_HTTP")?);
    if let Some(endpoint) = &endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    let others =
        ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"];
    let named = options.profile.clone();
    let profile = match named {
        Some(name) => Some((name, true)),
        None if options.anonymous || env("AWS_ACCESS_KEY_ID").is_some() => None,
        None => match env("AWS_PROFILE") {
            Some(name) => Some((name, true)),
            None if others.iter().any(|name| env(name).is_some()) => None,
            None => Some(("default".to_owned(), false)),
        },
    };
    if let Some((name, required)) = profile {
        let home = env("HOME").map(PathBuf::from).unwrap_or_default();
        let file = |name: &str, at: &str| env(name).map_or_else(|| home.join(".aws").join(at), PathBuf::from);
        let files = [file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), file("AWS_CONFIG_FILE", "config")];
        match profile_keys(&name, &files) {
            Ok(profile) => {
                builder = builder.with_access_key_id(profile.key).with_secret_access_key(profile.secret);
                if let Some(token) = profile.token {
                    builder = builder.with_token(token);
                }
                let region =
                    profile.region.filter(|_| env("AWS_REGION").or_else(|| env("AWS_DEFAULT_REGION")).is_none());
                if let Some(region) = region {
                    builder = builder.with_region(region);
                }
            }
            Err(reason) if required => return Err(refuse(bare, reason)),
            // An instance profile may follow.
            Err(_) => {}
        }
    }
    if let Some(region) = &options.region {
        builder = builder.with_region(region);
    }
    if let Some(path_style) = options.path_style {
        builder = builder.with_virtual_hosted_style_request(!path_style);
    }
    builder
        .with_skip_signature(options.anonymous)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(retry())
        .build()
        .map_err(|e| refuse(bare, e.to_string()))
}

fn gcs(bare: &str, bucket: &str, options: &Options) -> Result<object_store::gcp::GoogleCloudStorage> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
    let endpoint = options.endpoint.clone().or_else(|| builder.get_config_value(&GoogleConfigKey::BaseUrl));
    builder = builder
        .with_client_options(options.client(bare, endpoint.as_deref(), "GOOGLE_ALLOW_HTTP")?)
        .with_skip_signature(options.anonymous)
        .with_retry(retry());
    if let Some(endpoint) = &endpoint {
        builder = builder.with_base_url(endpoint);
    }
    // It knows the bucket: what is left to be wrong is a file with credentials.
    builder.build().map_err(|e| {
        let which = "correct what GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT names";
        refuse(bare, format!("its credentials cannot be used, {which}: {}", chain(&e)))
    })
}

fn azure(bare: &str, options: &Options) -> Result<object_store::azure::MicrosoftAzure> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_url(bare);
    let endpoint = options.endpoint.clone().or_else(|| builder.get_config_value(&AzureConfigKey::Endpoint));
    builder = builder
        .with_client_options(options.client(bare, endpoint.as_deref(), "AZURE_ALLOW_HTTP")?)
        .with_skip_signature(options.anonymous)
        .with_retry(retry());
    if let Some(account) = &options.account {
        builder = builder.with_account(account);
    }
    if let Some(endpoint) = endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    builder.build().map_err(|e| {
        let text = chain(&e);
        let what = if text.contains("Account must be specified") {
            "name the account, by the option `account` or in AZURE_STORAGE_ACCOUNT_NAME: "
        } else if text.contains("Invalid Access Key") {
            "AZURE_STORAGE_ACCOUNT_KEY must be base64, as the provider shows it: "
        } else {
            ""
        };
        refuse(bare, format!("{what}{text}"))
    })
}

// ---------------------------------------------------------------------------------------------------- AWS profiles

/// Keys of a profile that has them.
#[derive(PartialEq, Eq, Debug)]
struct Profile {
    key: String,
    secret: String,
    token: Option<String>,
    region: Option<String>,
}

/// Looks a profile up in the credentials file and the config file of the AWS tools, whose sections are `[name]` in the
/// first and `[profile name]` in the second. The first file that says something wins.
fn profile_keys(name: &str, files: &[PathBuf]) -> std::result::Result<Profile, String> {
    let mut found = BTreeMap::new();
    let mut there = false;
    for file in files {
        let Ok(text) = std::fs::read_to_string(file) else { continue };
        let section = section(&text, name);
        there |= section.is_some();
        for (key, value) in section.unwrap_or_default() {
            found.entry(key).or_insert(value);
        }
    }
    let places = files.iter().map(|file| format!("`{}`", file.display())).collect::<Vec<_>>().join(" and ");
    if !there {
        return Err(format!("the AWS profile `{name}` is neither in {places}"));
    }
    let mut take = |key: &str| found.remove(key);
    match (take("aws_access_key_id"), take("aws_secret_access_key")) {
        (Some(key), Some(secret)) => {
            Ok(Profile { key, secret, token: take("aws_session_token"), region: take("region") })
        }
        _ => Err(format!(
            "the AWS profile `{name}` holds no keys (in {places}), and a profile that gets them by single sign-on, by a role or by a program cannot be used as it is; put its keys into the environment: eval \"$(aws configure export-credentials --profile {name} --format env)\""
        )),
    }
}

/// The settings of a section of an INI file; none if there is no such section.
fn section(text: &str, name: &str) -> Option<BTreeMap<String, String>> {
    let mut inside = false;
    let mut found = None;
    for line in text.lines() {
        // Indented lines belong to a nested setting.
        let nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(title) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            let title = title.trim();
            inside = title == name || title.strip_prefix("profile ").map(str::trim) == Some(name);
            if inside {
                found.get_or_insert_with(BTreeMap::new);
            }
        } else if let Some((key, value)) = line.split_once('=')
            && inside
            && !nested
            && let Some(found) = &mut found
        {
            found.insert(key.trim().to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    found
}

// ------------------------------------------------------------------------------------------------ what to do about it

/// What a store answered, or why nothing came, on one line: a client of a store repeats in each error all of its causes.
#[derive(Debug)]
pub struct Cause(object_store::Error);

impl From<object_store::Error> for Cause {
    fn from(error: object_store::Error) -> Self {
        Self(error)
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&chain(&self.0))
    }
}

impl std::error::Error for Cause {}

/// An error and its causes on one line, each once.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let line = |error: &dyn std::error::Error| error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let mut text = line(error);
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = line(cause);
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Whether "not found" is said of the bucket.
pub(super) fn no_bucket(error: &object_store::Error) -> bool {
    // The last is said of an account of Azure.
    let words =
        ["NoSuchBucket", "ContainerNotFound", "bucket does not exist", "container does not exist", "ResourceNotFound"];
    matches!(error, object_store::Error::NotFound { .. } | object_store::Error::Generic { .. }) && {
        let text = chain(error);
        words.iter().any(|word| text.contains(word))
    }
}

/// What a person can do about an answer, where it is not just the store being away.
pub(super) fn advice(error: &object_store::Error) -> Option<&'static str> {
    use object_store::Error as E;
    if no_bucket(error) {
        return Some(
            "there is no such bucket: correct its name (or the option `endpoint` or the account), or make it; Tidemill makes none",
        );
    }
    let text = chain(error);
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if says(&["RequestTimeTooSkewed", "request timestamp", "Request has expired", "date header too old"]) {
        return Some("the clock of this machine is not that of the store: set it, by NTP");
    }
    if says(&["169.254.169.254", "169.254.170.2", "metadata.google.internal", "metadata endpoint"]) {
        return Some(
            "no credentials were found: set those of the provider in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY), or use the option `anonymous=true` for a public bucket",
        );
    }
    if says(&[
        "ExpiredToken",
        "TokenRefreshRequired",
        "The provided token has expired",
        "not valid in the specified time frame",
    ]) {
        return Some("the session token has expired: get another one and start anew with it");
    }
    if says(&["InvalidAccessKeyId"]) {
        return Some("the store does not know this access key: correct AWS_ACCESS_KEY_ID or the profile");
    }
    if says(&["SignatureDoesNotMatch"]) {
        return Some(
            "the secret does not fit the access key: correct AWS_SECRET_ACCESS_KEY or the profile (or, rarely, the option `region`)",
        );
    }
    if says(&["Server failed to authenticate the request"]) {
        return Some(
            "the key or token does not fit the account: correct AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or the token",
        );
    }
    if says(&["AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint"]) {
        return Some("the bucket is in another region: give it as the option `region` or in AWS_REGION");
    }
    // A list, and a deletion of many objects, only tell by their text.
    if matches!(error, E::PermissionDenied { .. } | E::Unauthenticated { .. })
        || says(&["status code: 401", "status code: 403", "(code: 403)"])
    {
        return Some(
            "access is denied: these credentials need to read and list below the prefix, and to write and delete there for publishing",
        );
    }
    if says(&["UnknownIssuer", "invalid peer certificate", "self-signed", "certificate verify failed"]) {
        return Some(
            "the certificate of the store is not trusted: give the authority that signed it as the option `ca_file`",
        );
    }
    if says(&["InvalidContentType", "corrupt message", "received corrupt"]) {
        return Some("the endpoint does not speak TLS: is it `http://`, with the option `allow_http=true`");
    }
    if says(&["URL scheme is not allowed"]) {
        return Some("the endpoint is `http://`: if that is meant, add the option `allow_http=true`");
    }
    if says(&["Connection refused", "dns error", "failed to lookup address", "No route to host"]) {
        return Some(
            "nothing answers at the endpoint: correct the option `endpoint` (or AWS_ENDPOINT_URL), or wait until it is back",
        );
    }
    None
}

/// Whether a store has no create-if-absent at all.
pub(super) fn not_offered(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    matches!(error, E::NotImplemented { .. } | E::NotSupported { .. })
        || chain(error).contains("NotImplemented")
        || chain(error).contains("501 Not Implemented")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(url: &str) -> String {
        open(url, false).unwrap_err().to_string()
    }

    #[test]
    fn an_address_that_cannot_be_used_says_why_and_what_there_is() {
        assert!(reason("ftp://host/x").contains("`ftp://` is not known; there are `s3://`"), "{}", reason("ftp://h/x"));
        assert!(reason("s3:///prefix").contains("name a bucket"));
        assert!(reason("s3://b/p?regoin=x").contains("no option `regoin`, only `endpoint`"));
        assert!(reason("s3://b/p?part_mib=4").contains("`part_mib` is `4`, expected a number from 5 to 1024"));
        assert!(reason("s3://b/p?endpoint=host:9000").contains("expected `https://host:port`"));
        assert!(reason("s3://b/p?endpoint=http://h:9000").contains("add the option `allow_http=true`"));
        assert!(reason("gs://b/p?region=eu").contains("options of `s3://`"));
        assert!(reason("s3://b/p?ca_file=/no/such.pem").contains("`ca_file` is `/no/such.pem`: No such file"));
        assert!(reason("s3://b/p?unsafe_create=yes").contains("expected `single-writer`"));
        assert!(reason("s3://b/p?path_style").contains("`path_style` has no value"));
    }

    #[test]
    fn a_secret_that_was_put_into_an_address_is_not_repeated() {
        for url in ["s3://b/p?secret_access_key=hush", "s3://key:hush@b/p"] {
            let reason = reason(url);
            assert!(!reason.contains("hush") && reason.contains("environment"), "{reason}");
        }
    }

    #[test]
    fn addresses_of_every_provider_are_opened_without_asking_them() {
        for url in [
            "s3://b?anonymous=true",
            "s3://b/p?endpoint=http://h:9000&allow_http=true&anonymous=true&region=eu-1&path_style=false&part_mib=5&parallel=2",
            "gs://b/p?anonymous=true",
            "az://c/p?account=a&anonymous=true",
            "abfss://c@a.dfs.core.windows.net/p?anonymous=true",
        ] {
            let place = open(url, true).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert!(place.local.is_none() && !place.single_writer);
        }
        let place = open("s3://b?anonymous=true&unsafe_create=single-writer&part_mib=16", true).unwrap();
        assert_eq!((place.single_writer, place.limits.part), (true, 16 << 20));
    }

    #[test]
    fn what_a_store_answered_is_said_once_and_on_one_line() {
        let answer = std::io::Error::new(std::io::ErrorKind::BrokenPipe, "<Error>\n  <Code>Nope</Code>\n</Error>");
        let cause = Cause::from(object_store::Error::Generic { store: "a", source: answer.into() });
        assert_eq!(cause.to_string(), "Generic a error: <Error> <Code>Nope</Code> </Error>");
        // So a connection that broke is not taken for a reader of our output who has gone.
        assert!(std::error::Error::source(&cause).is_none());
    }

    #[test]
    fn a_list_that_was_denied_is_told_by_its_text() {
        for (text, expected) in [
            ("Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>", Some("access is denied")),
            ("Server returned non-2xx status code: 401 Unauthorized: ", Some("access is denied")),
            ("403 Forbidden: Server failed to authenticate the request.", Some("does not fit the account")),
            ("Server returned non-2xx status code: 503 Service Unavailable: ", None),
        ] {
            let advice = advice(&object_store::Error::Generic { store: "a", source: text.into() });
            assert_eq!(advice.is_some(), expected.is_some(), "{text}");
            assert!(advice.unwrap_or_default().contains(expected.unwrap_or_default()), "{text}: {advice:?}");
        }
    }

    #[test]
    fn a_profile_gives_its_keys_and_one_without_keys_says_how_to_get_them() {
        let dir = tempfile::tempdir().unwrap();
        let files = [dir.path().join("credentials"), dir.path().join("config")];
        let missing = profile_keys("work", &files).unwrap_err();
        assert!(missing.contains("`work`") && missing.contains("credentials"), "{missing}");
        std::fs::write(
            &files[0],
            "# ours\n[default]\naws_access_key_id = D\n[work]\naws_access_key_id=K\naws_secret_access_key = S=/\n",
        )
        .unwrap();
        std::fs::write(
            &files[1],
            "[profile work]\nregion = eu-west-1\ns3 =\n  region = nested\n[profile sso]\nsso_session = x\n",
        )
        .unwrap();
        let work = Profile { key: "K".into(), secret: "S=/".into(), token: None, region: Some("eu-west-1".into()) };
        assert_eq!(profile_keys("work", &files), Ok(work));
        let sso = profile_keys("sso", &files).unwrap_err();
        assert!(sso.contains("export-credentials --profile sso"), "{sso}");
    }
}
