//! Markdown tables, on the terminal and in `target/bench`.

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::{Context, Result};

/// A table whose columns are as wide as they must be.
#[derive(Debug, Clone, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these column heads.
    pub fn new(heads: &[&str]) -> Self {
        Self {
            rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell =
            |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default().replace('|', "\\|");
        let widths: Vec<usize> = (0..columns)
            .map(|c| {
                self.rows
                    .iter()
                    .map(|row| cell(row, c).chars().count())
                    .max()
                    .unwrap_or(0)
                    .max(3)
            })
            .collect();
        let mut out = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            for (column, width) in widths.iter().enumerate() {
                let _ = write!(out, "| {:width$} ", cell(row, column));
            }
            out.push_str("|\n");
            if number == 0 {
                for width in &widths {
                    let _ = write!(out, "|{}", "-".repeat(width + 2));
                }
                out.push_str("|\n");
            }
        }
        out
    }
}

/// Writes a file into `bench` of the target directory, and says where.
///
/// # Errors
/// When it cannot be written.
pub fn write_report(name: &str, text: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("find the running program")?;
    // target/PROFILE/bench_x
    let target = exe
        .ancestors()
        .nth(2)
        .ok_or("the program lies in no target directory")?;
    let path = target.join("bench").join(name);
    std::fs::create_dir_all(target.join("bench")).context("make target/bench")?;
    std::fs::write(&path, text).context(path.display())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_padded_and_bars_escaped() {
        let mut table = Table::new(&["a", "longer"]);
        table.row(vec!["x|y".into(), "1".into()]);
        table.row(vec!["z".into()]);
        assert_eq!(
            table.markdown(),
            "| a    | longer |\n|------|--------|\n| x\\|y | 1      |\n| z    |        |\n"
        );
    }
}
