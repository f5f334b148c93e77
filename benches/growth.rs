//! How cost grows with entries, tags, tenants, bodies and invalidations: writes docs/growth.md and its plots anew.
//!
//! `cargo bench --bench growth`; `-- --quick` only shows that it works, and writes to `target/bench`; `-- --entries 10000000` is ten
//! times as many, which take 17 GB.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "support/measure.rs"]
mod measure;
mod support;
#[path = "support/turns.rs"]
mod turns;

use std::{
    fmt::Write as _,
    hint::black_box,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use http::{Request, Response};
use measure::{Body, PATH, Shared, at_once, batches, batches_of, nanos, resident};
use plotters::prelude::*;
use support::{Never, TENANT, served};
use tower::{Layer, Service, ServiceExt};
use tower_cache_aside::{Cache, CacheTags, Cascade, DataType, Route, Tier, Ttl};

struct Chart {
    file: &'static str,
    title: &'static str,
    of: &'static str,
    cost: &'static str,
    x: Vec<f64>,
    series: Vec<(String, Vec<f64>)>,
    /// What is to be seen.
    says: &'static str,
}

struct Options {
    entries: u64,
    is_quick: bool,
}

impl Options {
    fn from_args() -> Self {
        let mut this = Self { entries: 1_000_000, is_quick: false };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--entries" => this.entries = args.next().and_then(|n| n.parse().ok()).unwrap_or(this.entries),
                "--quick" => (this.is_quick, this.entries) = (true, 10_000),
                _ => {}
            }
        }
        this
    }

    fn rounds(&self) -> usize {
        if self.is_quick { 1 } else { 9 }
    }

    fn calls(&self, full: u64) -> u64 {
        if self.is_quick { full.div_ceil(50) } else { full }
    }
}

fn main() {
    let options = Options::from_args();
    let mut charts = vec![];
    let mut done = |some: Vec<Chart>| {
        for chart in &some {
            eprintln!("{}", table(chart));
        }
        charts.extend(some);
    };
    // The largest last: what it leaves behind in the allocator is nobody else's.
    done(tags(&options));
    done(tenants(&options));
    done(bodies(&options));
    done(invalidations(&options));
    done(entries(&options));
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let page = if options.is_quick { turns::folder(env!("CARGO_MANIFEST_DIR")) } else { docs };
    write(&page, &charts);
}

/// Fills with what these ask for, and says what one takes, in nanoseconds: the median of batches, each with all that is done for it
/// behind its client's back, as all is on one thread.
fn fill<S>(service: &mut S, requests: impl Iterator<Item = Request<Body>>) -> f64
where
    S: Service<Request<Body>, Error = Never>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut costs, mut requests) = (vec![], requests.peekable());
    let mut batch = Vec::with_capacity(64);
    while requests.peek().is_some() {
        batch.extend(requests.by_ref().take(64));
        let (calls, start) = (batch.len() as u64, Instant::now());
        runtime.block_on(async {
            for request in batch.drain(..) {
                black_box(service.call(request).await.unwrap());
            }
            tokio::task::yield_now().await;
        });
        costs.push(nanos(start.elapsed(), calls));
    }
    turns::median(&costs)
}

/// The same on two threads, for those that nobody measures.
fn fill_all<S>(service: &S, entries: std::ops::Range<u64>, path: impl Fn(u64) -> String + Sync)
where
    S: Service<Request<Body>, Error = Never> + Clone + Send + Sync,
{
    std::thread::scope(|scope| {
        for odd in [0, 1] {
            let (path, mut entries) = (&path, entries.clone());
            scope.spawn(move || {
                fill(&mut service.clone(), entries.by_ref().skip(odd).step_by(2).map(|n| served(&path(n))))
            });
        }
    });
}

/// The least of some rounds: what others do on the machine only adds to it, and the shape is what is looked for.
fn least_of(rounds: usize, round: impl FnMut() -> f64) -> f64 {
    std::iter::repeat_with(round).take(rounds).fold(f64::MAX, f64::min)
}

/// Numbers without an order, the same each time.
fn dice() -> impl FnMut() -> u64 {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 16
    }
}

fn entries(options: &Options) -> Vec<Chart> {
    let path = |n: u64| format!("/agents/{n:08}");
    let weight = {
        let cache = support::builder().body_limit(1_024).memory(1 << 30).build().unwrap();
        fill(&mut cache.layer().layer(support::sized(100)), (0..1_000).map(|n| served(&path(n))));
        cache.stats().store.bytes.div_ceil(1_000)
    };
    let (mut x, mut cost, mut memory) = (vec![], <[Vec<f64>; 3]>::default(), vec![]);
    let mut entries = 1_000;
    while entries <= options.entries {
        let cache_of =
            |entries| support::builder().body_limit(1_024).memory(weight * entries + (1 << 20)).build().unwrap();
        let before = resident();
        // So roomy that no part of it is full before all are in.
        let cache = cache_of(2 * entries);
        let mut service = cache.layer().layer(support::sized(100));
        let late = entries - (entries / 4).min(100_000);
        fill_all(&service, 0..late, path);
        cost[1].push(fill(&mut service, (late..entries).map(|n| served(&path(n)))));
        memory.push((resident() - before) / entries as f64);
        let (mut dice, calls) = (dice(), options.calls(20_000));
        cost[0].push(least_of(options.rounds(), || {
            batches_of(calls, || served(&path(dice() % entries)), |r| at_once(&mut service, r))
        }));
        drop((service, cache));
        // One that is full twice over, so that each that comes puts another one out.
        let cache = cache_of(entries / 2);
        let mut service = cache.layer().layer(support::sized(100));
        fill_all(&service, 0..late, path);
        cost[2].push(fill(&mut service, (late..entries).map(|n| served(&path(n)))));
        x.push(entries as f64);
        entries *= 10;
    }
    let [hit, fresh, evicting] = cost;
    let of = "entries";
    vec![
        Chart {
            file: "entries",
            title: "Entries in process, bodies of 100 B: time",
            of,
            cost: "ns",
            x: x.clone(),
            series: vec![
                ("a hit of any".into(), hit),
                ("a fill".into(), fresh),
                ("a fill that evicts".into(), evicting),
            ],
            says: "Hits are of entries at random. That they cost more where there are more is probably the processor's caches, into which \
                   they no longer fit; that was not looked into.",
        },
        Chart {
            file: "memory",
            title: "Entries in process, bodies of 100 B: memory of each",
            of,
            cost: "B",
            x: x[1..].to_vec(),
            series: vec![("an entry, all included".into(), memory[1..].to_vec())],
            says: "By the resident bytes of the process, which with few entries finds room that was freed before: only from 10,000 on. \
                   Each has an entity of its own and 8 headers of 240 B; the room that tables have for more is in it.",
        },
    ]
}

/// In process and in Redis, by how many entities an entry belongs to.
fn tags(options: &Options) -> Vec<Chart> {
    let counts = [1_u64, 2, 4, 8, 16, 32, 64];
    let builder = |tier: Option<Tier>| {
        let of = |name| tier.into_iter().fold(DataType::new(name, Ttl::Standard), DataType::tier);
        Cache::builder("bench")
            .tenant_header(TENANT)
            .data_type(of("agent"))
            .data_type(of("tool"))
            .cascade(Cascade::new("tool").drops(["agent"]))
            .route(Route::new("/agents/{agent_id}", "agent").declares_tags())
    };
    let origin = |count: u64| {
        support::origin().map_response(move |mut response: Response<Body>| {
            for n in 1..count {
                CacheTags::of(response.extensions_mut()).add("tool", n.to_string());
            }
            response
        })
    };
    let shared = Shared::start(1);
    let mut series = ["a hit in process", "a fill in process", "a hit in Redis, `off`", "a hit in Redis, `validated`"]
        .map(|name| (name.to_owned(), vec![]));
    for count in counts {
        let memory = builder(None).memory(1 << 30).build().unwrap();
        let mut service = memory.layer().layer(origin(count));
        fill(&mut service, [served(PATH), served(PATH)].into_iter());
        series[0]
            .1
            .push(least_of(options.rounds(), || batches(options.calls(10_000), PATH, |r| at_once(&mut service, r))));
        let fills = options.calls(20_000);
        series[1].1.push(fill(&mut service, (0..fills).map(|n| served(&format!("/agents/f{n}")))));
        for (i, tier) in [(2, Tier::Off), (3, Tier::Validated)] {
            let cache = shared.over(builder(Some(tier)), &format!("{tier:?}-{count}").to_lowercase());
            series[i].1.push(redis_hits(options, &shared, &cache.layer().layer(origin(count))));
        }
    }
    vec![Chart {
        file: "tags",
        title: "Entities that an entry belongs to",
        of: "entities",
        cost: "ns",
        x: counts.map(|count| count as f64).into(),
        series: series.into(),
        says: "A hit asks for the generation of each. Redis: one worker, 64 tasks.",
    }]
}

/// One call among 64 tasks of one worker, in nanoseconds.
fn redis_hits<S>(options: &Options, shared: &Shared, service: &S) -> f64
where
    S: Service<Request<Body>, Response = Response<tower_cache_aside::CacheBody<Body>>, Error = Never, Future: Send>
        + Clone
        + Send
        + 'static,
{
    shared.until_hit(service);
    let hits = || {
        1e3 * shared.spread(64, options.calls(6_400), |calls| {
            let mut service = service.clone();
            async move {
                for _ in 0..calls {
                    black_box(service.call(served(PATH)).await.unwrap());
                }
            }
        })
    };
    least_of(options.rounds(), hits)
}

fn tenants(options: &Options) -> Vec<Chart> {
    let entries = 100_000;
    let counts = [1_u64, 10, 100, 1_000, 10_000, 100_000];
    let mut series = ["a hit", "a fill", "everything of a tenant is dropped"].map(|name| (name.to_owned(), vec![]));
    let request = |n: u64, tenants: u64| {
        let mut request = served(&format!("/agents/{}", n / tenants));
        request.headers_mut().insert(TENANT, format!("tenant-{}", n % tenants).try_into().unwrap());
        request
    };
    for tenants in counts {
        let cache = support::builder().memory(1 << 30).build().unwrap();
        let mut service = cache.layer().layer(support::sized(100));
        let (mut dice, fills) = (dice(), fill(&mut service, (0..entries).map(|n| request(n, tenants))));
        let hits =
            || batches_of(options.calls(20_000), || request(dice() % entries, tenants), |r| at_once(&mut service, r));
        series[0].1.push(least_of(options.rounds(), hits));
        series[1].1.push(fills);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let drop_one = |n: u64| {
            let start = Instant::now();
            runtime.block_on(cache.invalidate(format!("tenant-{}", n % tenants)).everything().run()).unwrap();
            nanos(start.elapsed(), 1)
        };
        // Each once: the second time there is nothing left of it.
        series[2].1.push(turns::median(&(0..tenants.min(101)).map(drop_one).collect::<Vec<_>>()));
    }
    vec![Chart {
        file: "tenants",
        title: "Tenants, of 100,000 entries in process in all",
        of: "tenants",
        cost: "ns",
        x: counts.map(|count| count as f64).into(),
        series: series.into(),
        says: "Hits are of any entry of any tenant. Dropping all that a tenant has costs the more, the more it is: with one tenant these \
               are all 100,000 entries, and that is one drop, and one sample.",
    }]
}

fn bodies(options: &Options) -> Vec<Chart> {
    let sizes = [100_usize, 1 << 10, 10 << 10, 100 << 10, 1 << 20, 2 << 20];
    let shared = Shared::start(1);
    let mut series = ["a hit in process", "a fill in process", "a hit in Redis, `off`", "a hit in Redis, `validated`"]
        .map(|name| (name.to_owned(), vec![]));
    for size in sizes {
        let cache = support::builder().body_limit(4 << 20).memory(1 << 30).build().unwrap();
        let mut service = cache.layer().layer(support::sized(size));
        fill(&mut service, [served(PATH), served(PATH)].into_iter());
        series[0]
            .1
            .push(least_of(options.rounds(), || batches(options.calls(10_000), PATH, |r| at_once(&mut service, r))));
        let fills = options.calls((400 << 20) / size as u64).clamp(64, 20_000);
        series[1].1.push(fill(&mut service, (0..fills).map(|n| served(&format!("/agents/f{n}")))));
        for (i, tier) in [(2, Tier::Off), (3, Tier::Validated)] {
            let cache =
                shared.over(support::tiered(tier).body_limit(4 << 20), &format!("{tier:?}-{size}").to_lowercase());
            let service = cache.layer().layer(support::sized(size));
            shared.until_hit(&service);
            let calls = options.calls((100 << 20) / size as u64).clamp(64, 6_400);
            let hits = || {
                1e3 * shared.spread(8, calls, |calls| {
                    let mut service = service.clone();
                    async move {
                        for _ in 0..calls {
                            black_box(service.call(served(PATH)).await.unwrap());
                        }
                    }
                })
            };
            series[i].1.push(least_of(options.rounds(), hits));
        }
    }
    vec![Chart {
        file: "bodies",
        title: "Size of the body",
        of: "bytes",
        cost: "ns",
        x: sizes.map(|size| size as f64).into(),
        series: series.into(),
        says: "In process a body is shared and not copied, and with `validated` it does not travel. A fill takes what its origin \
               takes to make the body as well. Redis: one worker, 8 tasks.",
    }]
}

/// Hits that wait in line with invalidations of others of the same tenant: the slowest of a hundred.
fn invalidations(options: &Options) -> Vec<Chart> {
    let rates = [1_u64, 100, 1_000, 10_000, 50_000];
    let shared = Shared::start(2);
    let memory = support::builder().memory(1 << 30).build().unwrap();
    let validated = shared.cache(Tier::Validated);
    let mut series = [
        ("in process, half".to_owned(), vec![]),
        ("in process, p99".to_owned(), vec![]),
        ("in Redis, `validated`, half".to_owned(), vec![]),
        ("in Redis, `validated`, p99".to_owned(), vec![]),
    ];
    for rate in rates {
        for (i, cache) in [&memory, &validated].into_iter().enumerate() {
            let service = cache.layer().layer(support::origin());
            shared.until_hit(&service);
            let rounds = (0..3).map(|_| beside(options, &shared, cache, &service, rate));
            let [half, slow] = rounds.reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1])]).unwrap();
            series[2 * i].1.push(half);
            series[2 * i + 1].1.push(slow);
        }
    }
    vec![Chart {
        file: "invalidations",
        title: "Invalidations each second, and the latency of hits meanwhile",
        of: "invalidations a second",
        cost: "ns",
        x: rates.map(|rate| rate as f64).into(),
        series: series.into(),
        says: "One task reads, another one writes to other entities of the same tenant, on two workers.",
    }]
}

/// The median of the latencies, and what one of a hundred is beyond, in nanoseconds.
fn beside<S>(options: &Options, shared: &Shared, cache: &Cache, service: &S, rate: u64) -> [f64; 2]
where
    S: Service<Request<Body>, Error = Never, Future: Send> + Clone + Send + 'static,
    S::Response: Send,
{
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let (cache, stopped, mut service) = (cache.clone(), stop.clone(), service.clone());
    let for_so_long = Duration::from_millis(if options.is_quick { 50 } else { 1_000 });
    let writer = async move {
        let (start, mut n) = (Instant::now(), 0_u64);
        while !stopped.load(Ordering::Relaxed) {
            // What is due by now, at once where the timer is too coarse.
            while n < (start.elapsed().as_secs_f64() * rate as f64) as u64 && !stopped.load(Ordering::Relaxed) {
                cache.invalidate("tenant-17").mutated("type-0", format!("other-{n}")).run().await.unwrap();
                n += 1;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let reader = async move {
        let (start, mut took) = (Instant::now(), vec![]);
        while start.elapsed() < for_so_long {
            let request = served(PATH);
            let asked = Instant::now();
            black_box(service.call(request).await.unwrap());
            took.push(nanos(asked.elapsed(), 1));
            // What is answered at once never yields, and others are to come in between.
            tokio::task::yield_now().await;
        }
        stop.store(true, Ordering::Relaxed);
        took.sort_by(f64::total_cmp);
        [took[took.len() / 2], took[took.len() * 99 / 100]]
    };
    shared.runtime.block_on(async {
        let (writer, reader) = (tokio::spawn(writer), tokio::spawn(reader));
        writer.await.unwrap();
        reader.await.unwrap()
    })
}

fn figure(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

fn table(chart: &Chart) -> String {
    let mut text = format!("| {}, {} |", chart.of, chart.cost);
    for x in &chart.x {
        let _ = write!(text, " {x} |");
    }
    let _ = write!(text, "\n| --- |{}", " --- |".repeat(chart.x.len()));
    for (name, costs) in &chart.series {
        let _ = write!(text, "\n| {name} |");
        for cost in costs {
            let _ = write!(text, " {} |", figure(*cost));
        }
    }
    text + "\n"
}

fn write(folder: &Path, charts: &[Chart]) {
    let plots = folder.join("growth");
    std::fs::create_dir_all(&plots).unwrap();
    let mut page = include_str!("support/growth.md").to_owned();
    for chart in charts {
        plot(&plots.join(format!("{}.svg", chart.file)), chart);
        let (file, title) = (chart.file, chart.title);
        let _ = write!(page, "\n# {title}\n\n{}\n\n![{title}](growth/{file}.svg)\n\n{}", chart.says, table(chart));
    }
    std::fs::write(folder.join("growth.md"), page).unwrap();
    eprintln!("written to {}", folder.join("growth.md").display());
}

/// Both ways by powers of ten.
fn plot(path: &Path, chart: &Chart) {
    let all = || chart.series.iter().flat_map(|(_, costs)| costs.iter().copied());
    let (least, most) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
    let root = SVGBackend::new(path, (800, 400)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let (x, y) = ((chart.x[0]..*chart.x.last().unwrap()).log_scale(), (least / 2.0..most * 2.0).log_scale());
    let mut builder = ChartBuilder::on(&root);
    builder.margin(12).x_label_area_size(40).y_label_area_size(70);
    let mut plot = builder.build_cartesian_2d(x, y).unwrap();
    let short = |value: &f64| match *value {
        value if value >= 1e6 => format!("{} M", value / 1e6),
        value if value >= 1e3 => format!("{} k", value / 1e3),
        value => format!("{value}"),
    };
    let mut mesh = plot.configure_mesh();
    mesh.x_desc(chart.of).y_desc(chart.cost).x_label_formatter(&short).y_label_formatter(&short).draw().unwrap();
    for (i, (name, costs)) in chart.series.iter().enumerate() {
        let colour = Palette99::pick(i).stroke_width(2);
        let line = LineSeries::new(chart.x.iter().copied().zip(costs.iter().copied()), colour).point_size(3);
        plot.draw_series(line)
            .unwrap()
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    plot.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw().unwrap();
    root.present().unwrap();
}
