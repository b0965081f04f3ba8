//! What there is to find, and how it is found. Knows nothing of Erlang.

use std::collections::{BTreeMap, BTreeSet};

/// Something that can be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) id: u32,
    pub(crate) title: &'static str,
    pub(crate) text: &'static str,
}

/// Documents by the words in them.
#[derive(Debug, Default)]
pub(crate) struct Index {
    documents: Vec<Document>,
    /// A word, and the places in `documents` where it occurs.
    words: BTreeMap<String, BTreeSet<usize>>,
}

impl Index {
    /// The goods of a small shop.
    pub(crate) fn with_samples() -> Self {
        let goods = [
            ("Desk lamp", "A lamp of brass with a green shade"),
            ("Floor lamp", "A tall lamp for reading, with a dimmer"),
            ("Lantern", "Burns oil, for the garden"),
            ("Armchair", "Leather, to be put beside a reading lamp"),
            ("Bookshelf", "Oak, five shelves"),
            ("Writing desk", "Oak, two drawers, room for a lamp"),
        ];
        let mut index = Self::default();
        for (id, (title, text)) in (1..).zip(goods) {
            index.add(Document { id, title, text });
        }
        index
    }

    pub(crate) fn add(&mut self, document: Document) {
        let place = self.documents.len();
        for word in words(document.title).chain(words(document.text)) {
            self.words.entry(word).or_default().insert(place);
        }
        self.documents.push(document);
    }

    /// The documents that have every word of the query, in the order in which they were added.
    pub(crate) fn find(&self, query: &str) -> Vec<&Document> {
        let mut hits: Option<BTreeSet<usize>> = None;
        for word in words(query) {
            let places = self.words.get(&word).cloned().unwrap_or_default();
            hits = Some(match hits {
                None => places,
                Some(hits) => hits.intersection(&places).copied().collect(),
            });
        }
        hits.unwrap_or_default()
            .into_iter()
            .filter_map(|place| self.documents.get(place))
            .collect()
    }

    pub(crate) fn documents(&self) -> usize {
        self.documents.len()
    }

    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_query_must_occur() {
        let index = Index::with_samples();
        let titles = |query| index.find(query).iter().map(|d| d.title).collect::<Vec<_>>();
        assert_eq!(
            titles("LAMP"),
            ["Desk lamp", "Floor lamp", "Armchair", "Writing desk"]
        );
        assert_eq!(titles("reading lamp"), ["Floor lamp", "Armchair"]);
        assert_eq!(titles("lamp, oak"), ["Writing desk"]);
        assert!(titles("sofa").is_empty());
        assert!(titles("").is_empty());
        assert_eq!(index.documents(), 6);
    }
}
