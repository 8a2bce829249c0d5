//! What a person reads: sizes, times, tables that fit the terminal, errors with hints.

use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::daemon::Problem;

/// Prints an error and what to do about it.
pub fn show_error(error: &anyhow::Error) {
    // Part of it may come from a container, and is not to tell this terminal anything.
    let plain: String =
        format!("{error:#}").chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect();
    eprintln!("error: {plain}");
    let hint = error.chain().find_map(|cause| cause.downcast_ref::<Problem>()).map(|problem| problem.hint.as_str());
    match hint {
        Some("") => {}
        Some(hint) => eprintln!("hint: {hint}"),
        None => eprintln!("hint: `moyai --help` shows what can be done; daemon.log in the data folder has more"),
    }
}

/// Bytes, binary: 7.3 MiB.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A size as docker takes it: 64m, 1.5g, 1048576, 2GiB.
pub fn parse_size(text: &str) -> Option<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let split = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(split);
    let number: f64 = number.parse().ok()?;
    let shift = match unit.trim().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    let bytes = number * (1u64 << shift) as f64;
    (bytes.is_finite() && (0.0..9e18).contains(&bytes)).then_some(bytes as u64)
}

/// Cores as docker takes them (0.5), in thousandths.
pub fn parse_cpus(text: &str) -> Option<u64> {
    let cores: f64 = text.parse().ok()?;
    (cores.is_finite() && cores > 0.0 && cores < 1e6).then_some((cores * 1000.0).round() as u64)
}

/// Thousandths of a core: 0.5.
pub fn cpus(milli: u64) -> String {
    let text = format!("{}.{:03}", milli / 1000, milli % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A time as it is typed: 30s, 15m, 2h, 7d; seconds when it has no unit.
pub fn parse_duration(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// How long ago, in one unit: 4 s, 2 m, 3 h, 5 d.
pub fn age(unix_millis: u64) -> String {
    if unix_millis == 0 {
        return "—".to_owned();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = now.saturating_sub(Duration::from_millis(unix_millis)).as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} m", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A point in time: the time of day in UTC within a day, with the date beyond.
pub fn clock(unix_secs: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let text = moyai_runtime::container::timestamp(UNIX_EPOCH + Duration::from_secs(unix_secs));
    let (date, time) = text.split_once('T').unwrap_or((&text, ""));
    let time = time.get(..5).unwrap_or(time);
    if now.abs_diff(unix_secs) < 86_400 { format!("{time} UTC") } else { date.to_owned() }
}

/// Seconds since 1970 inside a sentence become a time one can read: "expired at 1800000000".
pub fn humanise_times(text: &str) -> String {
    let is_time =
        |word: &str| word.len() == 10 && word.starts_with(['1', '2']) && word.bytes().all(|b| b.is_ascii_digit());
    text.split(' ')
        .map(|word| {
            let bare = word.trim_end_matches([',', '.', ')', ':']);
            match bare.parse() {
                Ok(seconds) if is_time(bare) => format!("{}{}", clock(seconds), &word[bare.len()..]),
                _ => word.to_owned(),
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// A table: columns aligned, and the widest one that may be cut is cut to fit the terminal, visibly.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    // What other nodes say of themselves must not move the cursor.
    let clean = |cell: &String| cell.chars().map(|c| if c.is_control() { '?' } else { c }).collect::<String>();
    let rows: &[Vec<String>] = &rows.iter().map(|row| row.iter().map(clean).collect()).collect::<Vec<_>>();
    let columns = header.len();
    let mut widths: Vec<usize> = header.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (at, cell) in row.iter().enumerate().take(columns) {
            widths[at] = widths[at].max(cell.chars().count());
        }
    }
    if let Some(terminal) = terminal_width() {
        let mut total: usize = widths.iter().sum::<usize>() + 2 * (columns - 1);
        while total > terminal {
            let Some(widest) = (0..columns).filter(|at| widths[*at] > 12).max_by_key(|at| widths[*at]) else { break };
            let cut = (total - terminal).min(widths[widest] - 12);
            widths[widest] -= cut;
            total -= cut;
        }
    }
    let mut text = String::new();
    let header: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (at, cell) in row.iter().enumerate().take(columns) {
            let cut: String = if cell.chars().count() > widths[at] {
                cell.chars().take(widths[at] - 1).chain(['…']).collect()
            } else {
                cell.clone()
            };
            let pad = widths[at] - cut.chars().count();
            line.push_str(&cut);
            line.extend(std::iter::repeat_n(' ', pad + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn terminal_width() -> Option<usize> {
    if !std::io::stdout().is_terminal() {
        return None;
    }
    let columns = moyai_runtime::host::terminal_columns()?;
    (columns > 20).then_some(usize::from(columns))
}

/// One JSON object a line.
pub fn json_lines(rows: &[impl serde::Serialize]) -> anyhow::Result<()> {
    for row in rows {
        println!("{}", serde_json::to_string(row)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_go_both_ways() {
        assert_eq!(size(7_654_321), "7.3 MiB");
        assert_eq!(size(512), "512 B");
        assert_eq!(parse_size("64m"), Some(64 << 20));
        assert_eq!(parse_size("1.5g"), Some(3 << 29));
        assert_eq!(parse_size("2GiB"), Some(2 << 30));
        assert_eq!(parse_size("10"), Some(10));
        assert_eq!(parse_size("x"), None);
        assert_eq!(parse_size("-1m"), None);
    }

    #[test]
    fn cores_and_times_are_read() {
        assert_eq!(parse_cpus("0.5"), Some(500));
        assert_eq!(parse_cpus("0"), None);
        assert_eq!(cpus(500), "0.5");
        assert_eq!(cpus(2000), "2");
        assert_eq!(parse_duration("2h"), Some(7200));
        assert_eq!(parse_duration("90"), Some(90));
        assert_eq!(parse_duration("1w"), None);
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["web".to_owned(), "running".to_owned()], vec!["longer".to_owned(), "—".to_owned()]];
        assert_eq!(table(&["NAME", "STATE"], &rows), "NAME    STATE\nweb     running\nlonger  —\n");
    }

    #[test]
    fn times_in_sentences_are_readable() {
        assert_eq!(humanise_times("expired at 1700000000, says lab-1"), "expired at 2023-11-14, says lab-1");
    }
}
