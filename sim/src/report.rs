//! One self-contained HTML page: how what a mesh does grows with its size, each figure with the command that measures it.

use std::fmt::Write;

use crate::measure::{Distribution, Report};
use crate::options::Scenario;

/// What one chart shows: a title, the unit, the scenario it comes from, and the lines through its points.
struct Chart {
    title: &'static str,
    unit: &'static str,
    scenario: Scenario,
    lines: &'static [(&'static str, Figure)],
}

type Figure = fn(&Report) -> Option<f64>;

fn part(times: &Option<Distribution>, part: fn(&Distribution) -> f64) -> Option<f64> {
    times.as_ref().map(part)
}

const CHARTS: [Chart; 6] = [
    Chart {
        title: "Until 99 of 100 nodes know something new",
        unit: "ms",
        scenario: Scenario::Spread,
        lines: &[
            ("median", |report| part(&report.spread_ms, |times| times.p50)),
            ("longest", |report| part(&report.spread_ms, |times| times.max)),
        ],
    },
    Chart {
        title: "From the death of a machine to the start of its work on another",
        unit: "ms",
        scenario: Scenario::Failover,
        lines: &[
            ("median", |report| part(&report.failover_ms, |times| times.p50)),
            ("99 of 100", |report| part(&report.failover_ms, |times| times.p99)),
        ],
    },
    Chart {
        title: "From a submission to the start of each replica, fifty submitting at once",
        unit: "ms",
        scenario: Scenario::Storm,
        lines: &[
            ("median", |report| part(&report.placement_ms, |times| times.p50)),
            ("99 of 100", |report| part(&report.placement_ms, |times| times.p99)),
        ],
    },
    Chart {
        title: "Placements a second, fifty submitting at once",
        unit: "1/s",
        scenario: Scenario::Storm,
        lines: &[("placements", |report| report.placements_per_s)],
    },
    Chart {
        title: "Bytes a node sends in a second when nothing happens",
        unit: "B/s",
        scenario: Scenario::Idle,
        lines: &[("bytes", |report| Some(report.bytes_per_node_s))],
    },
    Chart {
        title: "Placed, of what a scheduler that sees everything would have placed, at 90 % load",
        unit: "%",
        scenario: Scenario::Load90,
        lines: &[("placed", |report| report.quality.map(|quality| quality * 100.0))],
    },
];

/// The scenarios that a report needs.
pub fn scenarios() -> Vec<Scenario> {
    let mut scenarios: Vec<Scenario> = Vec::new();
    for chart in &CHARTS {
        if !scenarios.contains(&chart.scenario) {
            scenarios.push(chart.scenario);
        }
    }
    scenarios
}

/// The page.
pub fn page(reports: &[Report]) -> String {
    let mut page = String::from(HEAD);
    for chart in &CHARTS {
        let runs: Vec<&Report> =
            reports.iter().filter(|report| report.scenario == chart.scenario.to_string()).collect();
        let lines: Vec<(&str, Vec<(f64, f64)>)> = chart
            .lines
            .iter()
            .map(|(name, figure)| {
                let points = runs.iter().filter_map(|run| Some((run.nodes as f64, figure(run)?)));
                (*name, points.collect())
            })
            .collect();
        // Writing to a string does not fail.
        let _written = write!(page, "<h2>{}</h2>\n{}", chart.title, plot(&lines, chart.unit));
        page.push_str("<table><tr><th>nodes<th>seed");
        for (name, _) in chart.lines {
            let _written = write!(page, "<th>{name}, {}", chart.unit);
        }
        page.push_str("<th>false deaths<th>held<th>again\n");
        for run in runs {
            let _written = write!(page, "<tr><td>{}<td>{}", run.nodes, run.seed);
            for (_, figure) in chart.lines {
                let text = figure(run).map_or("–".to_owned(), |value| format!("{value:.1}"));
                let _written = write!(page, "<td>{text}");
            }
            let held = if run.violations.is_empty() { "yes".to_owned() } else { format!("{:?}", run.violations) };
            let again = format!("--scenario {} --seed {} --nodes {}", run.scenario, run.seed, run.nodes);
            let _written = writeln!(page, "<td>{}<td>{held}<td><code>moyai-sim run {again}</code>", run.false_deaths);
        }
        page.push_str("</table>\n");
    }
    let wall: f64 = reports.iter().map(|report| report.wall_s).sum();
    let simulated: f64 = reports.iter().map(|report| report.simulated_s).sum();
    let _written = writeln!(
        page,
        "<p>{} runs, {simulated:.0} virtual seconds in {wall:.0} real ones. Network: at least 0.5 ms a way, 5 ms more on \
         average, exponentially distributed; failover with 1 % of messages lost; clocks up to 100 ppm off.</p>",
        reports.len()
    );
    page
}

const HEAD: &str = "<!doctype html><meta charset=utf-8><title>Moyai, simulated</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}
td:last-child,th:last-child{text-align:left}code{font-size:.85em}svg text{font:12px system-ui,sans-serif}
</style><h1>Moyai, simulated</h1>
<p>The daemon's own protocol code, driven by the simulator: the network, disks and containers are modelled. Every line
can be run again by its command.</p>
";
const COLOURS: [&str; 2] = ["#1b6ca8", "#c8553d"];
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 220.0;
const MARGIN: f64 = 50.0;

/// A plot over the logarithm of the mesh's size.
fn plot(lines: &[(&str, Vec<(f64, f64)>)], unit: &str) -> String {
    let all: Vec<(f64, f64)> = lines.iter().flat_map(|(_, points)| points).copied().collect();
    let top = all.iter().map(|(_, y)| *y).fold(0.0, f64::max).max(1e-9) * 1.1;
    let (least, most) = all.iter().fold((f64::MAX, 1.0f64), |(least, most), (x, _)| (least.min(*x), most.max(*x)));
    let span = (most.log10() - least.log10()).max(1e-9);
    let at = |(x, y): &(f64, f64)| {
        let right = MARGIN + (x.log10() - least.log10()) / span * (WIDTH - 2.0 * MARGIN);
        (right, HEIGHT - 30.0 - y / top * (HEIGHT - 50.0))
    };
    let mut svg = format!("<svg width={WIDTH} height={HEIGHT} role=img>");
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let (_, y) = at(&(least, value));
        let right = WIDTH - MARGIN;
        let _written = write!(
            svg,
            "<line x1={MARGIN} x2={right} y1={y} y2={y} stroke=#eee /><text x={} y={} text-anchor=end>{value:.0}</text>",
            MARGIN - 6.0,
            y + 4.0
        );
    }
    let mut sizes: Vec<f64> = all.iter().map(|(x, _)| *x).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    for size in sizes {
        let (x, _) = at(&(size, 0.0));
        let _written = write!(svg, "<text x={x} y={} text-anchor=middle>{size:.0}</text>", HEIGHT - 12.0);
    }
    for ((name, points), colour) in lines.iter().zip(COLOURS) {
        let path: Vec<String> = points.iter().map(|point| format!("{:.1},{:.1}", at(point).0, at(point).1)).collect();
        let _written =
            write!(svg, "<polyline fill=none stroke={colour} stroke-width=2 points=\"{}\" />", path.join(" "));
        for (x, y) in points.iter().map(at) {
            let _written = write!(svg, "<circle cx={x:.1} cy={y:.1} r=3 fill={colour} />");
        }
        if let Some((x, y)) = points.last().map(at) {
            let _written = write!(svg, "<text x={:.1} y={:.1} fill={colour}>{name}</text>", x + 6.0, y - 6.0);
        }
    }
    let _written = write!(svg, "<text x={MARGIN} y=14>{unit}</text><text x={} y={}>nodes</text>", WIDTH - 40.0, HEIGHT);
    svg.push_str("</svg>\n");
    svg
}
