//! `term!`.

/// A [`Term`](crate::Term) written as Erlang writes it.
///
/// | Written | Term |
/// |---|---|
/// | `ok`, `@"Elixir.Shop"` | atom |
/// | `"text"`, `b"bytes"` | binary |
/// | `7`, `-7`, `1.5` | number |
/// | `{a, 1}`, `{}` | tuple |
/// | `[1, 2]`, `[]` | list |
/// | `[1, 2; tail]` | list with a tail, Erlang's `[1, 2 | Tail]` |
/// | `#{key => value}` | map |
/// | `(expression)` | whatever has `Into<Term>` |
///
/// An identifier is the atom of that name, Rust's keywords too; atoms that are no identifiers are written
/// `@"shop@h1"`. A trailing comma is taken everywhere.
///
/// ```
/// use meshx_etf::{Term, term};
///
/// let (id, tags) = (7, Term::list([Term::atom("new")]));
/// let item = term!({ok, #{id => (id), name => "lamp", price => -1.5, (tags) => [1, 2; @"shop@h1"]}});
/// assert_eq!(item.to_string(), "{ok,#{id => 7,name => <<\"lamp\">>,price => -1.5,[new] => [1,2|shop@h1]}}");
/// assert_eq!(term!([]), Term::list([]));
/// assert_eq!(term!(true), Term::from(true));
/// ```
#[macro_export]
macro_rules! term {
    // === Parts, collected until a comma: `@list [done...] rest...` ===
    (@items [$($done:expr,)*]) => { [$($done,)*] };
    (@items [$($done:expr,)*] , $($rest:tt)*) => { $crate::term!(@items [$($done,)*] $($rest)*) };
    (@items [$($done:expr,)*] @ $text:literal $($rest:tt)*) => {
        $crate::term!(@items [$($done,)* $crate::term!(@ $text),] $($rest)*)
    };
    (@items [$($done:expr,)*] - $number:literal $($rest:tt)*) => {
        $crate::term!(@items [$($done,)* $crate::term!(- $number),] $($rest)*)
    };
    (@items [$($done:expr,)*] # $map:tt $($rest:tt)*) => {
        $crate::term!(@items [$($done,)* $crate::term!(# $map),] $($rest)*)
    };
    (@items [$($done:expr,)*] $one:tt $($rest:tt)*) => {
        $crate::term!(@items [$($done,)* $crate::term!($one),] $($rest)*)
    };

    // === Pairs: a key is one of the same forms, then `=>`, then a value ===
    (@pairs [$($done:expr,)*]) => { [$($done,)*] };
    (@pairs [$($done:expr,)*] , $($rest:tt)*) => { $crate::term!(@pairs [$($done,)*] $($rest)*) };
    (@pairs [$($done:expr,)*] @ $text:literal => $($rest:tt)*) => {
        $crate::term!(@value [$($done,)*] ($crate::term!(@ $text)) $($rest)*)
    };
    (@pairs [$($done:expr,)*] - $number:literal => $($rest:tt)*) => {
        $crate::term!(@value [$($done,)*] ($crate::term!(- $number)) $($rest)*)
    };
    (@pairs [$($done:expr,)*] # $map:tt => $($rest:tt)*) => {
        $crate::term!(@value [$($done,)*] ($crate::term!(# $map)) $($rest)*)
    };
    (@pairs [$($done:expr,)*] $key:tt => $($rest:tt)*) => {
        $crate::term!(@value [$($done,)*] ($crate::term!($key)) $($rest)*)
    };
    (@value [$($done:expr,)*] ($key:expr) @ $text:literal $($rest:tt)*) => {
        $crate::term!(@pairs [$($done,)* ($key, $crate::term!(@ $text)),] $($rest)*)
    };
    (@value [$($done:expr,)*] ($key:expr) - $number:literal $($rest:tt)*) => {
        $crate::term!(@pairs [$($done,)* ($key, $crate::term!(- $number)),] $($rest)*)
    };
    (@value [$($done:expr,)*] ($key:expr) # $map:tt $($rest:tt)*) => {
        $crate::term!(@pairs [$($done,)* ($key, $crate::term!(# $map)),] $($rest)*)
    };
    (@value [$($done:expr,)*] ($key:expr) $value:tt $($rest:tt)*) => {
        $crate::term!(@pairs [$($done,)* ($key, $crate::term!($value)),] $($rest)*)
    };

    // === A list, token by token until a `;` shows that it has a tail ===
    (@list [$($items:tt)*] ; $($tail:tt)+) => {
        $crate::Term::list_with_tail(
            ::std::vec::Vec::from($crate::term!(@items [] $($items)*)),
            $crate::term!($($tail)+),
        )
    };
    (@list [$($items:tt)*] $next:tt $($rest:tt)*) => { $crate::term!(@list [$($items)* $next] $($rest)*) };
    (@list [$($items:tt)*]) => { $crate::Term::list($crate::term!(@items [] $($items)*)) };

    // === Whole terms ===
    ({}) => { $crate::Term::Tuple(::std::vec::Vec::new()) };
    ({ $($items:tt)+ }) => { $crate::Term::tuple($crate::term!(@items [] $($items)+)) };
    ([]) => { $crate::Term::List(::std::vec::Vec::new()) };
    ([ $($items:tt)+ ]) => { $crate::term!(@list [] $($items)+) };
    (# {}) => { $crate::Term::Map($crate::Map::new()) };
    (# { $($pairs:tt)+ }) => { $crate::Term::map($crate::term!(@pairs [] $($pairs)+)) };
    (@ $text:literal) => { $crate::Term::atom($text) };
    (- $number:literal) => { $crate::Term::from(-$number) };
    (true) => { $crate::Term::from(true) };
    (false) => { $crate::Term::from(false) };
    ($literal:literal) => { $crate::Term::from($literal) };
    (( $value:expr )) => { $crate::Term::from($value) };
    ($atom:ident) => { $crate::Term::atom(::std::stringify!($atom)) };
}

#[cfg(test)]
mod tests {
    use crate::Term;

    #[test]
    fn every_form_in_every_place() {
        let seven = 7u8;
        let cases = [
            (term!(ok), "ok"),
            (term!(@"not an ident"), "'not an ident'"),
            (term!(fn), "fn"),
            (term!("text"), "<<\"text\">>"),
            (term!(b"\x00"), "<<0>>"),
            (term!(-1.5), "-1.5"),
            (term!((seven)), "7"),
            (term!({}), "{}"),
            (
                term!({-1, @"a b", #{}, [], {}, (seven),}),
                "{-1,'a b',#{},[],{},7}",
            ),
            (term!([1, 2,]), "[1,2]"),
            (term!([alias; -1]), "[alias|-1]"),
            (term!([alias; [1; (seven)]]), "[alias,1|7]"),
            (term!([#{}, -1; @"a b"]), "[#{},-1|'a b']"),
            (
                term!(#{-1 => @"x y", @"x y" => -1, #{} => #{1 => {}}, (seven) => [], "k" => true,}),
                "#{-1 => 'x y',7 => [],'x y' => -1,#{} => #{1 => {}},<<\"k\">> => true}",
            ),
        ];
        for (term, text) in cases {
            assert_eq!(term.to_string(), text);
        }
        assert_eq!(term!(false), Term::from(false));
    }
}
