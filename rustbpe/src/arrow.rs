//! String arrays from Arrow without copies, through its C data interface and PyCapsules.
//!
//! pyarrow, polars, pandas and DuckDB hand arrays over as two capsules (`__arrow_c_array__`) or as a stream of
//! arrays (`__arrow_c_stream__`). The three structs below are that interface; its specification stands in Arrow's
//! documentation under "The Arrow C data interface". This is the one file with unsafe code.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void, CStr};
use std::ptr;

use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyTuple};

use crate::ByteText;

#[repr(C)]
struct Schema {
    format: *const c_char,
    name: *const c_char,
    metadata: *const c_char,
    flags: i64,
    n_children: i64,
    children: *mut *mut Schema,
    dictionary: *mut Schema,
    release: Option<unsafe extern "C" fn(*mut Schema)>,
    private_data: *mut c_void,
}

#[repr(C)]
struct Array {
    length: i64,
    null_count: i64,
    offset: i64,
    n_buffers: i64,
    n_children: i64,
    buffers: *mut *const c_void,
    children: *mut *mut Array,
    dictionary: *mut Array,
    release: Option<unsafe extern "C" fn(*mut Array)>,
    private_data: *mut c_void,
}

#[repr(C)]
struct Stream {
    get_schema: Option<unsafe extern "C" fn(*mut Stream, *mut Schema) -> c_int>,
    get_next: Option<unsafe extern "C" fn(*mut Stream, *mut Array) -> c_int>,
    get_last_error: Option<unsafe extern "C" fn(*mut Stream) -> *const c_char>,
    release: Option<unsafe extern "C" fn(*mut Stream)>,
    private_data: *mut c_void,
}

/// An interface struct that its producer must be told to free; once moved out, `release` is None.
trait Release: Sized {
    /// All zero: released, and ready to be filled by a producer.
    fn empty() -> Self {
        // SAFETY: the three structs hold integers, raw pointers and optional functions; zero is valid for each.
        unsafe { std::mem::zeroed() }
    }

    fn release(&mut self);
}

macro_rules! release {
    ($($name:ident)*) => {$(
        impl Release for $name {
            fn release(&mut self) {
                if let Some(release) = self.release.take() {
                    // The producer expects the struct as it was filled.
                    self.release = Some(release);
                    // SAFETY: the struct came from a producer, is owned here and was not released before.
                    unsafe { release(self) };
                    self.release = None;
                }
            }
        }
    )*};
}
release!(Schema Array Stream);

/// Frees what it holds when it goes.
struct Owned<T: Release>(T);

impl<T: Release> Drop for Owned<T> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl<T: Release> Owned<T> {
    /// Takes the struct out of a capsule, which must have been made for this by an Arrow library.
    fn from_capsule(capsule: &Bound<'_, PyCapsule>, name: &CStr) -> PyResult<Self> {
        let pointer = capsule.pointer_checked(Some(name))?.cast::<T>();
        // SAFETY: a capsule of this name holds a valid struct of this kind (Arrow's PyCapsule interface). It is
        // moved, as the interface asks: what stays behind counts as released and will not be freed again.
        Ok(Owned(unsafe { ptr::replace(pointer.as_ptr(), T::empty()) }))
    }
}

/// Some texts of an Arrow array of strings. Owns the buffers, shared with whoever made them.
pub(crate) struct Strings {
    array: Owned<Array>,
    is_wide: bool, // offsets of 64 bits: `large_string`
}

/// What a Python object hands over array by array. It must have `__arrow_c_array__` or `__arrow_c_stream__`.
pub(crate) struct Source(Kind);

enum Kind {
    One(Option<Strings>),
    Many { stream: Owned<Stream>, is_wide: bool },
}

impl Source {
    /// Whether a Python object looks like Arrow data.
    pub(crate) fn is_arrow(source: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(source.hasattr("__arrow_c_array__")? || source.hasattr("__arrow_c_stream__")?)
    }

    pub(crate) fn open(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        if source.hasattr("__arrow_c_array__")? {
            let pair = source.call_method0("__arrow_c_array__")?.cast_into::<PyTuple>()?;
            let schema = Owned::from_capsule(pair.get_item(0)?.cast::<PyCapsule>()?, c"arrow_schema")?;
            let array = Owned::from_capsule(pair.get_item(1)?.cast::<PyCapsule>()?, c"arrow_array")?;
            return Ok(Source(Kind::One(Some(Strings { array, is_wide: is_wide(&schema)? }))));
        }
        if !source.hasattr("__arrow_c_stream__")? {
            let kind = source.get_type().name()?;
            return Err(PyTypeError::new_err(format!("expected an Arrow array of strings, found {kind}")));
        }
        let capsule = source.call_method0("__arrow_c_stream__")?.cast_into::<PyCapsule>()?;
        let mut stream = Owned::<Stream>::from_capsule(&capsule, c"arrow_array_stream")?;
        let mut schema = Owned(Schema::empty());
        let get_schema =
            stream.0.get_schema.ok_or_else(|| PyValueError::new_err("the stream is released"))?;
        // SAFETY: the stream is live and the schema an empty struct to be filled.
        let code = unsafe { get_schema(&mut stream.0, &mut schema.0) };
        stream.check(code)?;
        let is_wide = is_wide(&schema)?;
        Ok(Source(Kind::Many { stream, is_wide }))
    }

    /// The next array, or None at the end.
    pub(crate) fn next(&mut self) -> PyResult<Option<Strings>> {
        let (stream, is_wide) = match &mut self.0 {
            Kind::One(strings) => return Ok(strings.take()),
            Kind::Many { stream, is_wide } => (stream, *is_wide),
        };
        let mut array = Owned(Array::empty());
        let get_next = stream.0.get_next.ok_or_else(|| PyValueError::new_err("the stream is released"))?;
        // SAFETY: the stream is live and the array an empty struct to be filled.
        let code = unsafe { get_next(&mut stream.0, &mut array.0) };
        stream.check(code)?;
        Ok(array.0.release.is_some().then_some(Strings { array, is_wide }))
    }
}

impl Owned<Stream> {
    /// An error code of the last call as an exception.
    fn check(&mut self, code: c_int) -> PyResult<()> {
        if code == 0 {
            return Ok(());
        }
        let message = self.0.get_last_error.map_or(ptr::null(), |last| {
            // SAFETY: the stream is live, and its last call failed.
            unsafe { last(&mut self.0) }
        });
        let message = if message.is_null() {
            format!("error {code}")
        } else {
            // SAFETY: not null, so a C string that lives until the next call on the stream.
            unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
        };
        Err(PyOSError::new_err(format!("the Arrow stream failed: {message}")))
    }
}

/// Whether strings have 64-bit offsets; an error if they are no strings.
fn is_wide(schema: &Owned<Schema>) -> PyResult<bool> {
    let format = if schema.0.release.is_none() || schema.0.format.is_null() || !schema.0.dictionary.is_null()
    {
        c"a released or dictionary-encoded schema"
    } else {
        // SAFETY: a live schema has a C string as its format, and `schema` outlives this use.
        unsafe { CStr::from_ptr(schema.0.format) }
    };
    match format.to_bytes() {
        b"u" => Ok(false),
        b"U" => Ok(true),
        other => Err(PyTypeError::new_err(format!(
            "the Arrow array must be of type string or large_string (cast it, or take one column), \
             found format {:?}",
            String::from_utf8_lossy(other)
        ))),
    }
}

impl Strings {
    /// The texts in order; a null is a missing text.
    pub(crate) fn texts(&self) -> PyResult<Vec<ByteText<'_>>> {
        let array = &self.array.0;
        let (Ok(offset), Ok(length)) = (usize::try_from(array.offset), usize::try_from(array.length)) else {
            return Err(PyValueError::new_err("the Arrow array has a negative length or offset"));
        };
        if length == 0 {
            return Ok(Vec::new());
        }
        if array.release.is_none() || array.n_buffers != 3 || array.buffers.is_null() {
            return Err(PyValueError::new_err("the Arrow array must be live and have three buffers"));
        }
        // SAFETY: an array of strings has three buffers: validity bits, offsets, bytes.
        let [validity, offsets, bytes] = unsafe { *array.buffers.cast::<[*const u8; 3]>() };
        if offsets.is_null() {
            return Err(PyValueError::new_err("the Arrow array has no offsets"));
        }
        // SAFETY: there are offset + length + 1 offsets of the format's width; read_unaligned asks for no more.
        let boundary = |i: usize| unsafe {
            if self.is_wide {
                offsets.cast::<i64>().add(offset + i).read_unaligned()
            } else {
                i64::from(offsets.cast::<i32>().add(offset + i).read_unaligned())
            }
        };
        // SAFETY: validity is null (nothing is missing) or has a bit for each of offset + length places.
        let is_valid = |i: usize| {
            validity.is_null() || unsafe { *validity.add((offset + i) / 8) } >> ((offset + i) % 8) & 1 == 1
        };
        let mut texts = Vec::with_capacity(length);
        let mut start = boundary(0);
        for i in 0..length {
            let end = boundary(i + 1);
            if start < 0 || end < start || (bytes.is_null() && end > start) {
                return Err(PyValueError::new_err(format!("the Arrow array has bad offsets at row {i}")));
            }
            texts.push(ByteText(is_valid(i).then(|| match (end - start) as usize {
                0 => &[][..],
                // SAFETY: the bytes from start to end belong to row i and live as long as `self` holds the array.
                size => unsafe { std::slice::from_raw_parts(bytes.add(start as usize), size) },
            })));
            start = end;
        }
        Ok(texts)
    }
}
