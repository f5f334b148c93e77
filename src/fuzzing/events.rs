//! What sources say has changed: events as JSON, entries of streams, what regions tell each other, and PostgreSQL's log.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use pgwire_replication::{Lsn, ReplicationEvent};
use serde_json::{Value, json};

use super::{input::Input, store::values};
use crate::{
    cache::Cache,
    catalog::{Cascade, DataType, Ttl},
    events::{
        Event, EventChange, EventPolicy, event_of_entry,
        postgres::fuzzed::{Gathered, PREFIX, Place, Snapshot, TRUNCATE},
    },
    key::Tag,
    route::{Mutation, Route},
    store::{
        Fence, StreamEntry,
        fuzzed::entry,
        region::{FIELD, Kind, LONGEST, MOST, Record, Step, steps},
    },
};

/// Name, tenant, and the values of each field.
type Said = (String, Option<String>, BTreeMap<String, Vec<String>>);

/// What a second reader makes of JSON that has no member twice.
fn said(value: &Value) -> Option<Said> {
    let scalar = |value: &Value| match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Bool(value) => Some(vec![value.to_string()]),
        Value::Number(n) if n.is_f64() => {
            n.as_f64().filter(|n| n.abs() < 9_007_199_254_740_992.0).map(|n| vec![n.to_string()])
        }
        Value::Number(n) => Some(vec![n.to_string()]),
        Value::Null => Some(vec![]),
        _ => None,
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    // To serde, a list of its members is a struct as well.
    let member = |at: usize, name: &str| match value {
        Value::Array(members) => members.get(at),
        _ => value.get(name),
    };
    match value {
        Value::Object(members) if members.keys().all(|name| ["name", "tenant", "fields"].contains(&name.as_str())) => {}
        Value::Array(members) if (1..=3).contains(&members.len()) => {}
        _ => return None,
    }
    let tenant = match member(1, "tenant") {
        None | Some(Value::Null) => None,
        Some(value) => Some(text(value)?),
    };
    let mut fields = BTreeMap::new();
    if let Some(value) = member(2, "fields") {
        for (name, value) in value.as_object()? {
            let all = match value {
                Value::Array(all) => all.iter().map(scalar).collect::<Option<Vec<_>>>()?.concat(),
                one => scalar(one)?,
            };
            fields.insert(name.clone(), all);
        }
    }
    Some((text(member(0, "name")?)?, tenant, fields))
}

fn is(event: &Event, (name, tenant, fields): &Said) -> bool {
    let values: usize = fields.values().map(Vec::len).sum();
    let is_tenant = event.tenant_name() == tenant.as_deref();
    let is_same = fields.iter().all(|(field, values)| event.values(field) == values);
    event.name() == name && is_tenant && is_same && event.size() == values
}

/// An event as JSON is what a second reader makes of it, in whatever words and by whatever way it comes; and it drops what it names,
/// of its own tenant.
pub(super) fn events(data: &[u8]) {
    let read = |bytes: &[u8]| serde_json::from_slice::<Event>(bytes).ok();
    let (event, value) = (read(data), serde_json::from_slice::<Value>(data).ok());
    let Some(value) = value else { return assert_eq!(event, None) };
    let (known, again) = (said(&value), read(&serde_json::to_vec(&value).unwrap()));
    // What was there twice is so no more.
    assert_eq!(again.is_some(), known.is_some(), "{value}");
    let (Some(event), Some(known)) = (event, known) else { return };
    assert!(is(&event, &known), "{event:?} {known:?}");
    // A fraction may be written in other digits.
    let is_exact = known.2.values().flatten().all(|value| !value.contains('.'));
    assert!(!is_exact || again.is_some_and(|again| is(&again, &known)), "{value}");
    let (name, tenant, fields) = &known;
    let listed = json!({ "fields": fields, "tenant": tenant, "name": name });
    assert!(read(&serde_json::to_vec_pretty(&listed).unwrap()).is_some_and(|again| is(&again, &known)));
    of_a_stream(data, &known);
    of_the_log(data, &known);
    drops(&event);
}

/// The same as an entry of a stream, in both of its forms.
fn of_a_stream(data: &[u8], known: &Said) {
    let (name, tenant, fields) = known;
    let whole = event_of_entry(vec![(b"event".to_vec(), data.to_vec())]);
    assert_eq!(whole.is_ok_and(|event| is(&event, known)), !name.is_empty());
    let mut parts = vec![("name", name)];
    parts.extend(tenant.iter().map(|tenant| ("tenant", tenant)));
    parts.extend(fields.iter().flat_map(|(field, values)| values.iter().map(move |value| (&**field, value))));
    let parts = parts.into_iter().map(|(field, value)| (field.as_bytes().to_vec(), value.as_bytes().to_vec()));
    let read = event_of_entry(parts.collect());
    let is_taken = |field: &str| fields.get(field).is_some_and(|values| !values.is_empty());
    // There its name is no field's.
    if !is_taken("name") && !is_taken("tenant") {
        assert_eq!(read.is_ok_and(|event| is(&event, known)), !name.is_empty());
    }
}

/// The same as a message in the log.
fn of_the_log(data: &[u8], known: &Said) {
    let mut gathered = Gathered::at(Lsn(0));
    gathered.take(message(true, PREFIX, Bytes::copy_from_slice(data)));
    let is_truncation = known.2.get("op").is_some_and(|op| *op == [TRUNCATE]);
    assert_eq!(gathered.truncated.is_some(), is_truncation);
    assert!(is_truncation || matches!(&gathered.events[..], [event] if is(event, known)));
}

fn cache() -> &'static Cache {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    let by_code = |event: &Event| {
        let ids = event.values("id").iter();
        ids.map(|id| EventChange::new().mutated(if id.len() > 9 { "no such type" } else { "agent" }, id)).collect()
    };
    CACHE.get_or_init(|| {
        Cache::builder("svc")
            .tenant_header("x-tenant-id")
            .data_type(DataType::new("agent", Ttl::Standard))
            .data_type(DataType::new("config", Ttl::Standard))
            .route(Route::new("/agents/{agent_id}", "agent"))
            .route(Route::new("/agents/{agent_id}/config", "config"))
            .mutation(Mutation::put("/agents/{agent_id}", "agent"))
            .cascade(Cascade::new("agent").drops(["config"]))
            .event(EventPolicy::on("agents").mutated("agent", "id"))
            .event(EventPolicy::on("agents").when("op", ["delete"]).all("config"))
            .event(EventPolicy::on("teams").tenant("team").mutated("agent", "lead"))
            .event(EventPolicy::from_fn("code", by_code))
            .on_invalidated(|_, tags| heard().extend(tags.iter().cloned()))
            .memory(1 << 20)
            .body_limit(64 << 10)
            .build()
            .unwrap()
    })
}

/// Tags that were dropped.
fn heard() -> std::sync::MutexGuard<'static, Vec<Tag>> {
    static HEARD: Mutex<Vec<Tag>> = Mutex::new(vec![]);
    HEARD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What it drops is what it names, of the tenant that it names; and there is no more of it than it has values.
fn drops(event: &Event) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    heard().clear();
    let applied = runtime.block_on(cache().apply(std::slice::from_ref(event)));
    let tags = std::mem::take(&mut *heard());
    let is_known = ["agents", "teams", "code"].contains(&event.name());
    assert_eq!((applied.ignored == 0, applied.dropped.undelivered()), (is_known, 0));
    assert!(applied.refused.is_empty() || (tags.is_empty() && is_known));
    assert!(tags.len() <= 4 * event.size() + 3, "{} of {event:?}", tags.len());
    let tenant = match (event.name(), event.values("team")) {
        ("teams", [team]) => team,
        _ => event.tenant_name().unwrap_or_default(),
    };
    let head = cache().0.space.tenant(tenant);
    let head = head.head();
    assert!(tags.iter().all(|tag| tag.tenant() == head), "{tags:?}");
    if event.name() == "agents" && applied.refused.is_empty() {
        let named = |id: &String| ["agent", "config"].map(|of| Tag::entity(head, of, "agent", id.as_bytes()));
        assert!(event.values("id").iter().flat_map(named).all(|tag| tags.contains(&tag)), "{event:?} {tags:?}");
    }
}

/// Entries of a stream, as Redis answers them or in parts: an event has all that its entry says.
pub(super) fn entries(data: &[u8]) {
    let mut input = Input(data);
    if input.byte() % 2 == 0 {
        values(input.0).into_iter().filter_map(entry).for_each(|entry| one(entry.fields));
    }
    while !input.0.is_empty() {
        let fields = input.byte() % 6;
        one((0..fields).map(|_| (input.part(), input.part())).collect());
    }
}

fn one(fields: Vec<(Vec<u8>, Vec<u8>)>) {
    let is_json = matches!(&fields[..], [(field, _)] if field == b"event");
    let names = fields.iter().filter(|(field, _)| field == b"name").count();
    let tenants = fields.iter().filter(|(field, _)| field == b"tenant").count();
    let texts =
        || fields.iter().flat_map(|(field, value)| [field, value]).all(|part| std::str::from_utf8(part).is_ok());
    let has_name = fields.iter().any(|(field, value)| field == b"name" && !value.is_empty());
    let is_event = texts() && names == 1 && tenants <= 1 && has_name;
    let read = event_of_entry(fields.clone());
    if is_json {
        let of_json = serde_json::from_slice::<Event>(&fields[0].1).ok().filter(|event| !event.name().is_empty());
        return assert_eq!(read.ok(), of_json);
    }
    assert_eq!(read.is_ok(), is_event, "{fields:?} {read:?}");
    let Ok(event) = read else { return };
    assert_eq!((event.size(), event.tenant_name().is_some()), (fields.len() - names - tenants, tenants == 1));
    for (field, value) in &fields {
        let value = std::str::from_utf8(value).unwrap();
        match &field[..] {
            b"name" => assert_eq!(event.name(), value),
            b"tenant" => assert_eq!(event.tenant_name(), Some(value)),
            field => assert!(event.values(std::str::from_utf8(field).unwrap()).iter().any(|known| known == value)),
        }
    }
    drops(&event);
}

/// One thing that a region does by what it was told, as a second reader sees it.
#[derive(Debug, PartialEq)]
enum Done {
    Everything,
    /// Whether it is dropped, the writer, for how long it stands, the tag.
    Tag(bool, u128, Duration, Tag),
}

/// Entries of another region's stream: what can be read is written as the same bytes; each tag falls, in its order; and what cannot
/// be read is everything.
pub(super) fn records(data: &[u8]) {
    const OWN: u128 = 7;
    let mut input = Input(data);
    let hold = Duration::from_secs(input.byte().into());
    let (mut told, mut expected) = (vec![], vec![]);
    while !input.0.is_empty() {
        let bytes = match input.byte() % 4 {
            0 => input.part(),
            choice => made(choice, &mut input),
        };
        let record = Record::decode(Bytes::from(bytes.clone()));
        assert!(record.as_ref().is_none_or(|record| record.bytes() == bytes), "{record:?}");
        let others: &[u8] = if input.byte() == 255 { b"other" } else { FIELD };
        let record = record.filter(|_| others == FIELD);
        told.push(StreamEntry::of(vec![(others.to_vec(), bytes)]));
        let Some(Record { kind, writer, stands, tags }) = record else {
            expected.push(Done::Everything);
            continue;
        };
        let (writer, stands) = (if writer == Fence::NOBODY.writer { OWN } else { writer }, stands.min(LONGEST));
        match kind {
            Kind::Beat => {}
            Kind::Clear => expected.push(Done::Everything),
            Kind::Fence => expected.extend(tags.into_iter().map(|tag| Done::Tag(false, writer, stands, tag))),
            Kind::Drop => expected.extend(tags.into_iter().map(|tag| Done::Tag(true, writer, stands.max(hold), tag))),
        }
    }
    let most = told.iter().map(|entry| entry.fields[0].1.len() / 4).max().unwrap_or(0).max(MOST);
    let mut done = vec![];
    for step in steps(&told, OWN, hold) {
        match step {
            Step::Everything => done.push(Done::Everything),
            Step::Drop(fence, group) => {
                assert!(group.tags.len() <= most && fence.lease.is_zero());
                done.extend(group.tags.into_iter().map(|tag| Done::Tag(true, fence.writer, fence.hold, tag)));
            }
            Step::Fence(fence, group) => {
                assert!(fence.hold.is_zero());
                done.extend(group.tags.into_iter().map(|tag| Done::Tag(false, fence.writer, fence.lease, tag)));
            }
        }
    }
    assert_eq!(done, expected);
}

/// A record that can be read.
fn made(choice: u8, input: &mut Input<'_>) -> Vec<u8> {
    let kind = [Kind::Drop, Kind::Fence, Kind::Clear, Kind::Beat][usize::from(input.byte() % 4)];
    let writer = u128::from(input.byte()) << if choice == 1 { 0 } else { 120 };
    let stands = Duration::from_millis(u64::from(input.byte()) << if choice == 3 { 56 } else { 10 });
    let tags = (0..input.byte() % 8).map(|_| Tag(input.part().into())).collect();
    Record { kind, writer, stands, tags }.bytes()
}

fn message(transactional: bool, prefix: &str, content: Bytes) -> ReplicationEvent {
    ReplicationEvent::Message { transactional, lsn: Lsn(0), prefix: prefix.to_owned(), content }
}

/// What PostgreSQL says: a place, a snapshot, or messages in a log.
pub(super) fn log(data: &[u8]) {
    let mut input = Input(data);
    match input.byte() % 4 {
        0 => place(&String::from_utf8_lossy(input.0)),
        1 => snapshot(&String::from_utf8_lossy(input.0)),
        _ => messages(input),
    }
}

fn place(text: &str) {
    let Ok(place) = text.parse::<Place>() else { return };
    assert_eq!(place.to_string().parse(), Ok(place.clone()), "{text}");
    let at = |lsn: u64| Place { lsn: Lsn(lsn), ..place.clone() };
    assert_eq!(place.gap(&place, place.lsn), None);
    if let Some(after) = place.lsn.0.checked_add(1) {
        assert!(place.gap(&at(after), Lsn(after)).is_some() && at(after).gap(&place, place.lsn).is_some());
    }
    assert!(place.is_history_of(&at(0)));
}

fn snapshot(text: &str) {
    let Some(snapshot) = Snapshot::parse(text) else { return };
    let mut parts = text.split(':');
    let mut number = || parts.next().unwrap().parse::<u64>().unwrap();
    let (xmin, xmax) = (number(), number());
    let open: BTreeSet<u64> = parts.next().unwrap().split(',').filter_map(|xid| xid.parse().ok()).collect();
    // Ids near those that are said, and not near the ends of all numbers.
    let near = open.iter().chain([&xmin, &xmax]).flat_map(|xid| [xid.wrapping_sub(1), *xid, xid.wrapping_add(1)]);
    for xid in near.filter(|xid| xid.abs_diff(xmax) < 1 << 31 && (1 << 32..u64::MAX >> 1).contains(&xmax)) {
        let sees = xid < xmin || (xid < xmax && !open.contains(&xid));
        assert_eq!(snapshot.sees(xid as u32), sees, "{xid} in {text}");
    }
    let _ = snapshot.sees(u32::MAX);
}

/// Whatever comes, each message is given once, after what was before it, with its transaction; and what has come goes ahead only.
fn messages(mut input: Input<'_>) {
    let mut gathered = Gathered::at(Lsn(0));
    let (mut open, mut to) = (None::<u32>, 0);
    let (mut waiting, mut xids) = (0, BTreeSet::new());
    while !input.0.is_empty() {
        let (choice, at) = (input.byte() % 8, u64::from(input.byte()));
        let event = match choice {
            0 => ReplicationEvent::Begin { final_lsn: Lsn(at), xid: at as u32, commit_time_micros: 0 },
            1 => ReplicationEvent::Commit { lsn: Lsn(at), end_lsn: Lsn(at), commit_time_micros: 0 },
            2 => ReplicationEvent::KeepAlive { wal_end: Lsn(at), reply_requested: false, server_time_micros: 0 },
            3 => message(true, "another's", input.part().into()),
            4 => message(false, PREFIX, input.part().into()),
            5 => message(true, PREFIX, format!(r#"{{"name": "t", "fields": {{"op": "{TRUNCATE}"}}}}"#).into()),
            6 => message(true, PREFIX, vec![b' '; usize::from(input.byte()) << 8].into()),
            _ => message(true, PREFIX, input.part().into()),
        };
        match choice {
            0 => open = Some(at as u32),
            1 => (open, to) = (None, to.max(at)),
            2 if open.is_none() => to = to.max(at),
            4.. => {
                xids.extend(open);
                waiting += 1;
            }
            _ => {}
        }
        let is_end = choice == 1 || (choice >= 4 && open.is_none());
        gathered.take(event);
        assert_eq!(gathered.to, Lsn(to));
        let is_truncated = usize::from(gathered.truncated.is_some());
        assert_eq!(gathered.events.len() + gathered.unreadable.len() + is_truncated, waiting);
        assert!(gathered.is_due() == (waiting > is_truncated) || (!is_end && gathered.has_room()));
        // As it is read.
        if gathered.is_due() || !gathered.has_room() {
            let given = gathered.give();
            assert!(given.to == Lsn(to) && given.truncated.is_none());
            assert!(xids.iter().all(|xid| given.xids.contains(xid)) && given.xids.len() <= waiting);
            waiting = 0;
            xids.clear();
            assert_eq!(gathered.truncated.take().is_some(), is_truncated == 1);
        }
    }
}
