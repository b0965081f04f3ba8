//! Findings and steps, as people read them: the level first, in columns, what to do behind the arrow.

/// Columns that a line should have at most.
const WIDTH: usize = 120;
const ARROW: &str = "-> ";

/// One finding or step.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) level: String,
    pub(super) what: String,
    pub(super) text: String,
    /// Empty when there is nothing to do.
    pub(super) fix: String,
}

/// All rows, each on a line when there is room for it.
pub(super) fn report(rows: &[Row]) -> String {
    let widest = |cell: fn(&Row) -> &String| rows.iter().map(|row| cell(row).chars().count()).max();
    let level = widest(|row| &row.level).unwrap_or(0);
    let what = widest(|row| &row.what).unwrap_or(0);
    let indent = " ".repeat(level + what + 4);
    let mut out = String::new();
    for row in rows {
        // What to do is said once, where the text says it already.
        let fix = match row.fix.is_empty() || row.text.contains(&row.fix) {
            true => String::new(),
            false => format!("{ARROW}{}", row.fix),
        };
        let room = WIDTH.saturating_sub(indent.len());
        let mut lines = wrap(&row.text, room);
        let last = lines.last().map_or(0, |line| line.chars().count());
        match lines.last_mut() {
            Some(line) if !fix.is_empty() && last + 1 + fix.chars().count() <= room => {
                line.push(' ');
                line.push_str(&fix);
            }
            _ if !fix.is_empty() => lines.extend(wrap(&fix, room)),
            _ => {}
        }
        let head = format!("{:level$}  {:what$}  ", row.level, row.what);
        for (i, line) in lines.iter().enumerate() {
            let start = if i == 0 { &head } else { &indent };
            out.push_str(format!("{start}{line}").trim_end());
            out.push('\n');
        }
    }
    out
}

/// Lines of at most so many columns, broken at blanks; a longer word stands alone. Control characters, line breaks
/// of a check's output for example, count as blanks.
fn wrap(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
    {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= room => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(level: &str, what: &str, text: &str, fix: &str) -> Row {
        Row {
            level: level.to_owned(),
            what: what.to_owned(),
            text: text.to_owned(),
            fix: fix.to_owned(),
        }
    }

    #[test]
    fn levels_come_first_and_long_lines_are_broken_at_blanks() {
        let long = "word ".repeat(30);
        let rows = [
            row("ok", "agent", "answers", ""),
            row("warning", "epmd", "listens", "stop it"),
            row("error", "x", &long, "do this"),
            row("no", "rule", "denied; meshx allow a b", "meshx allow a b"),
        ];
        let text = report(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.first(), Some(&"ok       agent  answers"));
        assert_eq!(lines.get(1), Some(&"warning  epmd   listens -> stop it"));
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert_eq!(
            lines.get(3),
            Some(&"                word word word word word word word word word -> do this")
        );
        assert_eq!(lines.last(), Some(&"no       rule   denied; meshx allow a b"));
    }

    #[test]
    fn a_checks_output_cannot_forge_lines() {
        let text = report(&[row("error", "service", "x\nok  service  fine\u{1b}[2J", "")]);
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(!text.contains('\u{1b}'));
    }
}
